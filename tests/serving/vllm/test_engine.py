# SPDX-License-Identifier: Apache-2.0
"""Right under what an engine does: caches, mixed batches, chunks, refusals; and vLLM's own where nothing is set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .serving import Request, assert_equal, engine, picture, serve

LONG = " ".join(["what is in this picture ? who are you ?"] * 12)  # several blocks of the cache behind the image
PROMPT = "look : {image} " + LONG
QUARTER = {"name": "divprune", "keep_ratio": 0.25}
HALF = {"name": "divprune", "keep_ratio": 0.5}
SAME_COUNT = {"name": "uniform", "keep_ratio": 0.25}
MMTOK = {"name": "mmtok", "keep_ratio": 0.25}
A, B = picture(50, 31, 1), picture(23, 60, 1)  # the caches of the engine hold those of other tests
MROPE = ("qwen3_vl", "qwen2_5_vl")


@pytest.fixture(scope="module", params=["llava", MROPE[0], pytest.param(MROPE[1], marks=pytest.mark.slow)])
def reference(request, reference_of):
    return reference_of(request.param)


@pytest.fixture
def plain(reference, engine_of):
    """An engine without a setting."""
    return engine_of(reference.name)


def check(reference, llm, requests, default=None) -> list[int]:
    """Compare a batch with transformers; returns how many tokens of each prompt were in the prefix cache."""
    answers = serve(llm, reference.name, requests)
    for request, answer in zip(requests, answers, strict=True):
        assert_equal(reference.answer(request, default), answer)
    return [answer.cached for answer in answers]


def test_the_prefix_cache_keeps_budgets_and_methods_apart(reference, plain):
    """One prompt and image, one request after another: none may have another one's image."""
    kinds = (QUARTER, HALF, SAME_COUNT, None)
    first = [check(reference, plain, [Request(PROMPT, [A], method)])[0] for method in kinds]
    again = [check(reference, plain, [Request(PROMPT, [A], method)])[0] for method in kinds]
    assert first == [0] * len(kinds)
    assert all(cached >= 64 for cached in again)


def test_the_prefix_cache_keeps_questions_apart(reference, plain):
    one, other = ("look : {image} who is this ? " + LONG, "look : {image} what is this ? " + LONG)
    cached = [check(reference, plain, [Request(text, [A], MMTOK)])[0] for text in (one, other, one)]
    assert cached[:2] == [0, 0] and cached[2] >= 64


def test_a_batch_mixes_methods_budgets_and_none(reference, plain):
    check(
        reference,
        plain,
        [
            Request(PROMPT, [A], QUARTER),
            Request(PROMPT, [A], None),
            Request("who are you ?"),
            Request(PROMPT, [B], HALF),
            Request("compare {image} and {image} who is this ?", [A, B], MMTOK),
            Request("look : {image} who is this ?", [A], MMTOK),
            Request("look : {image} what is this ?", [A], MMTOK),
            Request("compare {image} and {image} who is this ?", [A, A], SAME_COUNT),
        ],
    )


def test_a_name_that_a_client_gives_an_image_is_not_that_of_its_plan(reference, plain):
    uuid = {"multi_modal_uuids": {"image": ["mine"]}}
    cached = [
        check(reference, plain, [Request(PROMPT, [B], method, uuid)])[0] for method in (QUARTER, HALF, SAME_COUNT, None)
    ]
    assert cached == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "fastv", "keep_ratio": 0.5}, "before the LLM"),
        ({"name": "divprune"}, "budget"),
        ({"name": "divprune", "keep_tokens": 5000}, "5000"),
        ({"name": "divprune", "keep_tokens": 0}, "no place"),
        ({"name": "nosuch", "keep_ratio": 0.5}, "nosuch"),
        ({"name": "divprune", "keep_ratio": 0.5, "positions": "original"}, "compact"),
        ({"keep_ratio": 0.5}, "name"),
    ],
)
def test_a_bad_request_is_refused_and_harms_nobody(reference, plain, method, message):
    from vllm.exceptions import VLLMValidationError  # a server answers it with HTTP 400

    with pytest.raises(VLLMValidationError, match=message):
        serve(plain, reference.name, [Request(PROMPT, [A], method)])
    check(reference, plain, [Request("look : {image} who is this ?", [A], QUARTER)])


@pytest.mark.parametrize("name", ["llava", *(pytest.param(name, marks=pytest.mark.slow) for name in MROPE)])
def test_chunked_prefill_and_a_servers_default(name, reference_of, folder):
    """Chunks of 24 tokens cut through images and text; a request overrides the default, or turns it off."""
    reference = reference_of(name)
    options = dict(max_num_batched_tokens=24, max_num_seqs=4, enable_chunked_prefill=True)
    with engine(folder / name, hf_overrides={"vtprune": HALF}, **options) as llm:
        requests = [
            Request(PROMPT, [A]),
            Request(PROMPT, [A], QUARTER),
            Request("compare {image} and {image} " + LONG, [A, B]),
            Request(PROMPT, [A], None),
            Request("who are you ?"),
            Request(PROMPT, [B]),
        ]
        check(reference, llm, requests, default=HALF)


_PLAIN = """
import sys
from pathlib import Path

from serving.vllm.serving import engine
from serving.vllm.test_engine import alone

if __name__ == "__main__":
    path = Path(sys.argv[1])
    with engine(path, max_model_len=1024) as llm:
        print("ANSWERS", alone(llm, path.name))
"""


def alone(llm, name) -> str:
    """Answers to requests, one after another, as JSON. No cache holds their images or their texts."""
    asked = [Request("who is this ? {image} " + LONG, [picture(47, 38, 2)]), Request("picture who are you ? " + LONG)]
    answers = [serve(llm, name, [request])[0] for request in asked]
    assert not any(answer.cached for answer in answers)
    return json.dumps([[answer.tokens, answer.logprobs.tolist(), answer.prompt] for answer in answers])


@pytest.mark.parametrize("name", ["llava", *(pytest.param(name, marks=pytest.mark.slow) for name in MROPE)])
def test_where_nothing_is_set_vllm_is_untouched(name, engine_of, folder, tmp_path):
    """Bit by bit, against an engine that loads no plug-in."""
    ours = alone(engine_of(name), name)
    script = tmp_path / "plain.py"
    script.write_text(_PLAIN)
    env = os.environ | {"VLLM_PLUGINS": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, script, folder / name]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))
    assert json.loads(line.removeprefix("ANSWERS ")) == json.loads(ours)
