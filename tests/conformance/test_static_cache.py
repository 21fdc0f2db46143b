# SPDX-License-Identifier: Apache-2.0
"""Static caches: the answers of a cache that grows, in as many columns as are left and are to come."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, StaticCache

import vtprune
from vtprune.testing import families
from vtprune.transformers_private import CACHE, Cache, cache_of

from . import models
from .test_text_towers import SMALL

NEW = 5
VARIED = ("llava", "qwen2_5_vl", "gemma3")
METHODS = ("divprune", "fastv", "transprune", "mustdrop")
ALLOCATED = [
    *(("llava", method, "original") for method in METHODS),
    *(("llava", method, "compact") for method in METHODS[:3]),
    ("gemma3", "fastv", "compact"),
    ("qwen2_5_vl", "transprune", "original"),
]
CASES = [("llava", "transprune"), ("qwen2_5_vl", "divprune"), ("gemma3", "fastv")]


def generate(model, inputs: dict[str, Tensor], **options):
    options = {"max_new_tokens": NEW, "suppress_tokens": [families.IMAGE, families.VIDEO]} | options
    return model.generate(
        **inputs, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0, **options
    )


def static(model, columns: int) -> Cache:
    return StaticCache(config=model.get_decoder().config, max_cache_len=columns)


def widths(cache: Cache) -> list[int]:
    """Columns that each layer has memory for."""
    return [layer.keys.shape[2] for layer in cache.layers if getattr(layer, "keys", None) is not None]


def assert_same(output, expected) -> None:
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


def compare(model, inputs, method, *, options=None, **fields):
    """A generation on a static cache, once it is found to be that on a growing one; and its session's report."""
    with vtprune.prune(model, method, keep_ratio=0.5, **fields) as session:
        expected = generate(model, inputs, **options or {})
        counts = session.report.counts
        output = generate(model, inputs, cache_implementation="static", **options or {})
    assert isinstance(cache_of(output), StaticCache)
    assert_same(output, expected)
    assert torch.equal(session.report.counts, counts) and session.report.keep_ratio < 1
    return output, session.report


def served(name: str, method: str) -> bool:
    """Whether a family can be pruned by a method at all."""
    try:
        vtprune.prune(families.shared(name), method, keep_ratio=0.5)
    except vtprune.UnsupportedStageError:
        return False
    return True


def runs_on_static_caches(model, inputs) -> bool:
    """Whether a model does without a session."""
    try:
        generate(model, inputs, cache_implementation="static", max_new_tokens=2)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("method", ["divprune", "fastv"])
@pytest.mark.parametrize("name", families.NAMES)
def test_every_family(name, method):
    """A padded batch of prompts with images of different sizes."""
    if not served(name, method):
        pytest.skip("tokens cannot go inside this language model")
    model = families.shared(name)
    inputs = families.batch(name, model).inputs
    if not runs_on_static_caches(model, inputs):
        pytest.skip("this model runs on no static cache by itself")
    try:
        compare(model, inputs, method)
    except vtprune.UnsupportedStageError as error:
        # Its layers look their keys up by column number, or keep prompt and answer apart.
        own = ("StaticIndexedLayer", "StaticReferenceSlidingWindowLayer")
        assert name in families.CARRY_STATE and any(layer in str(error) for layer in own)


@pytest.mark.parametrize(("name", "method", "positions"), ALLOCATED)
def test_what_is_kept_and_what_is_to_come_is_all_that_is_allocated(name, method, positions):
    model = families.shared(name)
    for inputs in families.batch(name, model).singles:
        _, report = compare(model, inputs, method, positions=positions)
        length = inputs["input_ids"].shape[1]
        left = [len(report.cached(0, layer)) for layer in range(report.depth)]
        with vtprune.prune(model, method, keep_ratio=0.5, positions=positions), torch.no_grad():
            output = model(**inputs, **{CACHE: static(model, length + NEW)})
        text = length - int(report.original_tokens[0])
        assert widths(cache_of(output)) == [text + visual + NEW for visual in left]
        assert len(set(left)) > 1 or method not in ("fastv", "transprune")


@pytest.mark.parametrize("method", ["divprune", "transprune"])
def test_eager_attention(method):
    model = families.build("llava", "eager")
    compare(model, families.batch("llava", model).inputs, method, positions="compact")


@pytest.mark.parametrize(("name", "method"), CASES)
def test_beams_and_several_sequences(name, method):
    model = families.shared(name)
    compare(model, families.batch(name, model).inputs, method, options={"num_beams": 3, "num_return_sequences": 2})


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_sliding_windows(method):
    """Prompts, and what is left of them, are longer than the window of some layers."""
    model = families.build("gemma3", sliding_window=9)
    output, _ = compare(model, families.batch("gemma3", model).inputs, method, positions="compact")
    assert min(widths(cache_of(output))) == 9 - 1 + NEW - 1


def test_windows_in_all_layers_are_refused():
    """Such a cache forgets, and does not tell how many tokens are to come."""
    model = models.with_text_tower(MistralConfig(**SMALL, sliding_window=12))
    with (
        vtprune.prune(model, "divprune", keep_ratio=0.5),
        pytest.raises(vtprune.UnsupportedStageError, match="full sliding window"),
    ):
        generate(model, models.batch_of_three(model).inputs(), cache_implementation="static")


@pytest.mark.parametrize(("name", "method"), CASES)
def test_by_hand(name, method):
    """Positions and masks are the model's own business, step by step."""
    model, steps = families.shared(name), []
    inputs = families.batch(name, model).singles[2]
    length = inputs["input_ids"].shape[1]
    with vtprune.prune(model, method, keep_ratio=0.5, positions="compact"), torch.no_grad():
        for cache in (static(model, length + NEW), None):
            output = model(**inputs, **{CACHE: cache}, use_cache=True)
            logits = [output.logits[:, -1]]
            for _ in range(NEW):
                ids = logits[-1].argmax(-1, keepdim=True)
                output = model(input_ids=ids, **{CACHE: cache_of(output)}, use_cache=True)
                logits.append(output.logits[:, -1])
            steps.append(torch.stack(logits))
    torch.testing.assert_close(*steps, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_second_turn_and_a_reset(name, method):
    """The caller's own cache goes on, with room for what was left; reset, it takes the next conversation."""
    model = families.shared(name)
    batch = families.batch(name, model)
    mask = batch.inputs["attention_mask"]
    question = torch.tensor([[5, 6, 7, 8]]).expand(len(mask), -1)
    room = mask.shape[1] + 2 * NEW + question.shape[1]
    outputs = []
    with vtprune.prune(model, method, keep_ratio=0.5, positions="compact"):
        for cache in (static(model, room), None):
            first = generate(model, batch.inputs, **({} if cache is None else {CACHE: cache}))
            ids = torch.cat([first.sequences, question], 1)
            turn = {"input_ids": ids, "attention_mask": torch.cat([mask, mask.new_ones(len(ids), NEW + 4)], 1)}
            outputs.append((first, generate(model, turn, **{CACHE: cache_of(first)})))
        for output, expected in zip(*outputs, strict=True):
            assert_same(output, expected)
        cache = cache_of(outputs[0][1])
        assert int(cache.get_seq_length()) == room - 1
        cache.reset()
        assert_same(generate(model, batch.inputs, **{CACHE: cache}), outputs[1][0])


@pytest.mark.parametrize("name", VARIED)
def test_what_is_not_pruned_stays_the_models_own(name):
    """`keep_ratio=1.0`, and prompts of text: bit for bit."""
    model = families.shared(name)
    text = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    for inputs, ratio in ((families.batch(name, model).inputs, 1.0), (text, 0.5)):
        expected = generate(model, inputs, cache_implementation="static")
        with vtprune.prune(model, "fastv", keep_ratio=ratio):
            output = generate(model, inputs, cache_implementation="static")
        assert torch.equal(torch.stack(output.logits), torch.stack(expected.logits))


def test_what_cannot_work_is_refused_and_changes_nothing():
    model = families.build("llava")
    inputs = families.batch("llava", model).singles[0]
    length = inputs["input_ids"].shape[1]
    small, large, offloaded = static(model, length - 1), static(model, length + NEW), static(model, length + NEW)
    offloaded.offloading = True
    refused = [
        ("lazyllm", large, "lazyllm brings tokens back .* no room"),
        ("divprune", small, f"for {length - 1} columns, and {length} tokens came"),
        ("divprune", offloaded, "static cache that is offloaded"),
    ]
    for method, cache, message in refused:
        kinds = [type(layer) for layer in cache.layers]
        with vtprune.prune(model, method, keep_ratio=0.5), pytest.raises(vtprune.VTPruneError, match=message):
            model(**inputs, **{CACHE: cache})
        assert [type(layer) for layer in cache.layers] == kinds and not cache.get_seq_length()


def test_other_back_ends_are_refused(monkeypatch):
    """Their masks are not over columns that are not filled yet."""
    model = families.build("llava")
    monkeypatch.setattr(model.get_decoder().config, "_attn_implementation_internal", "flash_attention_2")
    inputs = families.batch("llava", model).singles[0]
    with (
        vtprune.prune(model, "divprune", keep_ratio=0.5),
        pytest.raises(vtprune.UnsupportedStageError, match="flash_attention_2.*load the model with 'sdpa'"),
    ):
        model(**inputs, **{CACHE: static(model, 100)})


def test_a_mask_of_unknown_origin_is_refused():
    model = families.build("llava")
    inputs = families.batch("llava", model).singles[0]
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(1, 1, length, length + NEW, dtype=torch.bool).tril()
    with (
        vtprune.prune(model, "divprune", keep_ratio=0.5),
        pytest.raises(vtprune.UnsupportedStageError, match="ready-made 4D"),
    ):
        model(**inputs | {"attention_mask": mask}, **{CACHE: static(model, length + NEW)})


def test_a_static_cache_outlives_its_session_only_to_refuse():
    model = families.build("llava")
    inputs = families.batch("llava", model).singles[0]
    cache = static(model, inputs["input_ids"].shape[1] + NEW)
    with vtprune.prune(model, "fastv", keep_ratio=0.5), torch.no_grad():
        model(**inputs, **{CACHE: cache})
    with pytest.raises(vtprune.VTPruneError, match="has been removed"):
        model(input_ids=torch.tensor([[5]]), **{CACHE: cache})
    with (
        vtprune.prune(model, "fastv", keep_ratio=0.5),
        pytest.raises(vtprune.VTPruneError, match="another vtprune session"),
    ):
        model(input_ids=torch.tensor([[5]]), **{CACHE: cache})
