# SPDX-License-Identifier: Apache-2.0
"""Several threads, or asyncio tasks, call one model under one session: each gets what it gets alone."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from transformers import TextIteratorStreamer

import vtprune
from vtprune.errors import VTPruneError
from vtprune.testing import families
from vtprune.transformers_private import CACHE

from . import matrix
from .methods import METHODS, spec
from .processors import processor

THREADS, CALLS, NEW = 8, 200, 3
FIRST = ("divprune", "fastv", "transprune", "mustdrop", "lazyllm")
"""Methods of each stage, which the default run tries; the others are for the long one."""


@pytest.fixture(autouse=True)
def _threads_take_turns_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def requests(name: str, model) -> list[dict[str, Tensor]]:
    """Prompts with images, text alone, and a padded batch of both."""
    singles, sparse = families.batch(name, model).singles, families.batch(name, model, media="sparse")
    return [*singles, sparse.singles[1], sparse.inputs]


@torch.no_grad()
def generate(model, inputs: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    """(batch, new tokens) ids and their logits (batch, new tokens, vocabulary)."""
    output = model.generate(
        **inputs,
        max_new_tokens=NEW,
        suppress_tokens=[families.IMAGE, families.VIDEO],
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, 1)


def at_once(work: Callable[[int], object], calls: int) -> list:
    """What `work` returns for 0 to `calls` - 1, called from all threads, which start together."""
    barrier = threading.Barrier(THREADS)
    with ThreadPoolExecutor(THREADS, initializer=lambda: barrier.wait(timeout=60)) as pool:
        return list(pool.map(work, range(calls)))


def check(name: str, method: str, calls: int, **options) -> None:
    model = families.shared(name)
    methods = spec(method)
    if reason := matrix.refusal(model, methods):
        pytest.skip(reason)
    prompts = requests(name, model)

    with vtprune.prune(model, methods, strict=False) as session:
        alone = []
        for prompt in prompts:
            alone.append((*generate(model, prompt, **options), session.report.to_dict()))
    per_round = session.totals

    def call(number: int):
        own = number % len(prompts)
        # The report is read where the call was made.
        return own, *generate(model, prompts[own], **options), session.report.to_dict()

    with vtprune.prune(model, methods, strict=False) as session:
        answers = at_once(call, calls)
    for own, ids, logits, report in answers:
        assert torch.equal(ids, alone[own][0])
        assert torch.equal(logits, alone[own][1])
        assert report == alone[own][2]
    rounds = calls // len(prompts)
    totals = session.totals
    assert totals.prefills == rounds * per_round.prefills >= calls
    assert totals.original_tokens == rounds * per_round.original_tokens > 0
    assert totals.text_tokens == rounds * per_round.text_tokens
    assert totals.kept_tokens == pytest.approx(rounds * per_round.kept_tokens)
    assert totals.prefill_flops == pytest.approx(rounds * per_round.prefill_flops)
    assert totals.keep_ratio == pytest.approx(per_round.keep_ratio)


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in ("fastv", "lazyllm") else pytest.mark.slow) for name in METHODS]
)
def test_concurrent_calls_are_those_one_by_one(method):
    check("llava", method, CALLS if method == "fastv" else CALLS // 8)


@pytest.mark.slow
@pytest.mark.parametrize("method", FIRST)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "gemma3", "mistral3", "llava_next"])
def test_concurrent_calls_on_other_families(name, method):
    check(name, method, 40)


@pytest.mark.parametrize("method", ["random", "fastv"])
def test_concurrent_calls_without_a_cache(method):
    check("llava", method, 40, use_cache=False)


def test_calls_from_threads_after_the_session_are_refused_or_unpruned():
    """Leaving the session while threads generate is no way to get another answer."""
    model = families.build("llava")
    prompt = requests("llava", model)[0]
    full = generate(model, prompt)
    with vtprune.prune(model, "fastv", keep_ratio=0.5):
        pruned = generate(model, prompt)
    assert not torch.equal(full[1], pruned[1])
    session = vtprune.patch(model, "fastv", keep_ratio=0.5)

    def call(number: int):
        if number == 60:
            session.remove()
        try:
            return generate(model, prompt)
        except VTPruneError as error:
            return error

    for answer in at_once(call, 120):
        if not isinstance(answer, Exception):
            assert any(torch.equal(answer[1], known[1]) for known in (full, pruned))


# -- whose report ------------------------------------------------------------------------------------------------------


def in_thread(work: Callable[[], object]) -> object:
    answers: list = []
    thread = threading.Thread(target=lambda: answers.append(work()))
    thread.start()
    thread.join()
    return answers[0]


def test_a_thread_that_made_no_call_sees_the_only_report():
    model = families.shared("llava")
    first, second, *_ = requests("llava", model)
    with vtprune.prune(model, "fastv", keep_ratio=0.5) as session:
        assert session.report is None
        for prompt in (first, second):  # one thread after another, each of which ends
            theirs = in_thread(lambda prompt=prompt: (generate(model, prompt), session.report)[1])
            assert session.report.to_dict() == theirs.to_dict()
        generate(model, first)
        own = session.report
        in_thread(lambda: generate(model, second))
        assert session.report is own
    assert session.report is own
    assert session.totals.prefills == 4


def test_the_report_of_several_other_threads_is_an_error():
    model = families.shared("llava")
    prompts = requests("llava", model)
    with vtprune.prune(model, "fastv", keep_ratio=0.5, strict=False) as session:
        at_once(lambda number: generate(model, prompts[number % 3]), THREADS * 2)
        with pytest.raises(VTPruneError, match="have called the model, and this one has not: .* `session.totals`"):
            session.report  # noqa: B018 (reading it is what fails)


def test_tasks_of_one_thread_have_reports_of_their_own():
    model = families.shared("llava")
    prompts = requests("llava", model)[:3]

    async def task(session, prompt):
        with torch.no_grad():
            model(**prompt)
        await asyncio.sleep(0)  # the others' turn
        return session.report.original_tokens

    async def main(session):
        return await asyncio.gather(*(task(session, prompt) for prompt in prompts))

    with vtprune.prune(model, "divprune", keep_ratio=0.5) as session:
        counts = asyncio.run(main(session))
    expected = [int((prompt["input_ids"] == families.IMAGE).sum()) for prompt in prompts]
    assert counts == [[count] for count in expected]
    assert len(set(expected)) > 1


@torch.no_grad()
def test_streams_that_take_turns_have_caches_of_their_own():
    """What comes back to one cache is not in the other one's report."""
    model = families.shared("llava")
    first, second, *_ = requests("llava", model)
    with vtprune.prune(model, "lazyllm", keep_ratio=0.5) as session:
        one = model(**first, use_cache=True)
        model(**second, use_cache=True)
        told = session.report.to_dict()
        step = one.logits[:, -1:].argmax(-1)
        model(input_ids=step, **{CACHE: one[CACHE]})
        assert session.report.to_dict() == told


@torch.no_grad()
def test_streams_that_take_turns_without_a_cache_keep_their_choices():
    """Each call holds the prompt and all that was generated; what was chosen for the prompt stays."""
    model = families.shared("llava")
    first, second, *_ = requests("llava", model)
    with vtprune.prune(model, "random", keep_ratio=0.5) as session:
        alone = [generate(model, prompt, use_cache=False)[0][0].tolist() for prompt in (first, second)]
        streams = []
        for prompt in (first, second):
            features = model.model.get_image_features(prompt["pixel_values"], return_dict=True)
            streams.append((prompt["input_ids"], {"image": features}, []))
        prefills = session.totals.prefills
        for _ in range(NEW):
            for number, (ids, features, answer) in enumerate(streams):
                logits = model(input_ids=ids, mm_encoder_outputs=features, use_cache=False).logits[:, -1]
                logits[:, [families.IMAGE, families.VIDEO]] = float("-inf")
                answer.append(int(logits.argmax()))
                streams[number] = torch.cat([ids, torch.tensor([[answer[-1]]])], 1), features, answer
        assert session.totals.prefills == prefills + 2
    assert [answer for _, _, answer in streams] == alone


# -- what all calls share ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text", "prompt_length"])
def test_two_threads_cannot_change_what_all_share(name):
    model = families.shared("llava")
    with vtprune.prune(model, "mmtok", keep_ratio=0.5, strict=False) as session:
        setattr(session, name, None)
        setattr(session, name, None)

        def change():
            with pytest.raises(VTPruneError, match="another one has changed them"):
                setattr(session, name, None)

        in_thread(change)
    with vtprune.prune(model, "mmtok", keep_ratio=0.5, strict=False) as session:
        in_thread(lambda: setattr(session, name, None))
        setattr(session, name, None)  # that thread has ended


def test_a_streamer_in_a_thread():
    model = families.shared("llava")
    words = processor("llava").tokenizer
    prompt = requests("llava", model)[0]
    with vtprune.prune(model, "fastv", keep_ratio=0.5) as session:
        expected, _ = generate(model, prompt)
        streamer = TextIteratorStreamer(words, skip_prompt=True)
        options = dict(max_new_tokens=NEW, suppress_tokens=[families.IMAGE, families.VIDEO], streamer=streamer)
        thread = threading.Thread(target=model.generate, kwargs={**prompt, **options})
        thread.start()
        text = "".join(streamer)
        thread.join()
        assert text == words.decode(expected[0])
        assert session.totals.prefills == 2
