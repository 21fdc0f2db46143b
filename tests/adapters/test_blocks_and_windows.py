# SPDX-License-Identifier: Apache-2.0
"""Language models in which attention is not simply causal: images or prompts as blocks whose tokens see one another
both ways, sliding windows shorter than the sequence. After a cut both hold for the tokens that are there."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import vtprune
from vtprune.testing import families
from vtprune.testing.media import END, FIRST_WORD, IMAGE, START
from vtprune.testing.recompute import recompute, visual_columns
from vtprune.transformers_private import CACHE

from .checks import ATOL, NEW

# Windows that are shorter than an image, than what is left of a prompt, than a prompt before pruning.
WINDOWED = [(name, window) for name in ("gemma3", "paligemma2", "mistral3") for window in (8, 30)] + [("pixtral", 12)]
MODELS = [("gemma3", None), ("paligemma", None), ("paligemma2", None), *WINDOWED]
every_model = pytest.mark.parametrize(("name", "window"), MODELS)
every_block = pytest.mark.parametrize(("name", "window"), [pair for pair in MODELS if "gemma" in pair[0]])
every_prefix = pytest.mark.parametrize(("name", "window"), [pair for pair in MODELS if "paligemma" in pair[0]])

METHODS = {
    "before the LLM": [{"name": "divprune", "keep_ratio": 0.4}],
    "at layer 1": [{"name": "fastv", "layer": 1, "keep_ratio": 0.3}],
    "at layers 1 and 3": [{"name": "transprune", "layers": (1, 3), "schedule": (0.6, 0.2)}],
    "everywhere": [
        {"name": "divprune", "keep_ratio": 0.7},
        {"name": "transprune", "layers": (1, 3), "schedule": (0.8, 0.3)},
    ],
}
every_method = pytest.mark.parametrize("method", METHODS)
POSITIONS = {"sdpa": "original", "eager": "compact"}
both_attentions = pytest.mark.parametrize("attention", POSITIONS)
NOTHING = torch.empty(0, dtype=torch.long)


@functools.cache
def built(name: str, window: int | None, attention: str = "sdpa"):
    return families.build(name, attention, **({} if window is None else {"sliding_window": window}))


def session_on(model, method: str, positions: str):
    return vtprune.prune(model, [part | {"positions": positions} for part in METHODS[method]])


def kept_columns(report, sample: int, first: int = 0) -> list[Tensor]:
    return [report.kept(sample, layer) - first for layer in range(report.depth)]


@torch.no_grad()
def generate(model, inputs, **options):
    return model.generate(
        **inputs,
        **options,
        max_new_tokens=NEW,
        suppress_tokens=[IMAGE],
        output_logits=True,
        return_dict_in_generate=True,
    )


def error(model, output, sample: int, inputs, kept: list[Tensor], positions: str) -> float:
    """Largest difference between the logits of a generation and the recomputed ones."""
    expected = recompute(model, inputs, output.sequences[sample, -NEW:-1], kept, positions)[-NEW:]
    return (torch.stack(output.logits, 1)[sample] - expected).abs().max().item()


def check_batch(model, batch: families.Batch, method: str, positions: str, **options) -> None:
    with session_on(model, method, positions) as session:
        output = generate(model, batch.inputs, **options)
    for sample, inputs in enumerate(batch.singles):
        kept = kept_columns(session.report, sample, batch.first_column(sample))
        assert error(model, output, sample, inputs, kept, positions) < ATOL


@torch.no_grad()
def check_forward(model, inputs, singles, method: str) -> None:
    """Logits of all surviving columns; samples begin in the first column."""
    with session_on(model, method, "original") as session:
        logits = model(**inputs).logits
    for sample, single in enumerate(singles):
        expected = recompute(model, single, NOTHING, kept_columns(session.report, sample))
        alive = ~expected.isnan().any(-1)
        assert 0 < int(alive.sum()) < len(alive)
        got = logits[sample, : len(expected)]
        torch.testing.assert_close(got[alive], expected[alive], atol=ATOL, rtol=0)


@both_attentions
@every_method
@every_model
def test_a_padded_batch(name, window, method, attention):
    model = built(name, window, attention)
    check_batch(model, families.batch(name, model), method, POSITIONS[attention])


@both_attentions
@every_method
@every_model
def test_two_images_alone(name, window, method, attention):
    """Without padding, masks may be left out, and decoding takes another path."""
    model, positions = built(name, window, attention), POSITIONS[attention]
    inputs = families.batch(name, model).singles[1]
    with session_on(model, method, positions) as session:
        output = generate(model, inputs)
    assert error(model, output, 0, inputs, kept_columns(session.report, 0), positions) < ATOL


@every_method
@every_model
def test_right_padding(name, window, method):
    model = built(name, window)
    batch = families.batch(name, model, padding_side="right")
    check_forward(model, batch.inputs, batch.singles, method)


@every_method
@pytest.mark.parametrize("name", ["gemma3", "paligemma", "paligemma2"])
def test_generation_behind_right_padding(name, method):
    model = built(name, None)
    check_batch(model, families.batch(name, model, padding_side="right"), method, "original")


@every_method
@every_block
def test_without_a_cache(name, window, method):
    model = built(name, window)
    check_batch(model, families.batch(name, model), method, "original", use_cache=False)


@both_attentions
@every_method
@every_block
def test_a_prompt_that_ends_with_an_image(name, window, method, attention):
    """Its last row, which FastV reads, is part of a block."""
    model = built(name, window, attention)
    inputs = dict(families.batch(name, model).singles[1])
    end = int(visual_columns(model, inputs)[-1]) + 1
    inputs |= {key: inputs[key][:, :end] for key in ("input_ids", "attention_mask", "token_type_ids")}
    check_forward(model, inputs, [inputs], method)


@both_attentions
@every_method
@every_prefix
def test_an_answer_behind_the_prefix_is_causal(name, window, method, attention):
    """As in training: types are 0 in the prompt and 1 in the answer."""
    model = built(name, window, attention)
    inputs = dict(families.batch(name, model).singles[0])
    inputs["token_type_ids"] = (torch.arange(inputs["input_ids"].shape[1]) >= 28).long()[None]
    check_forward(model, inputs, [inputs], method)


def conversation(name: str, before: Tensor, answers: Tensor, after: Tensor) -> dict[str, Tensor]:
    """Prompts (samples, columns), answers and what follows, as one sequence. The prefix of PaliGemma is the prompt."""
    ids = torch.cat([before, answers, after], 1)
    behind = (torch.arange(ids.shape[1]) >= before.shape[1]).long().expand_as(ids)
    types = (ids == IMAGE).long() if name == "gemma3" else behind
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types}


# Attention rows cannot be recomputed over a window that has dropped a part of the conversation.
TURNS = [
    (name, window, method, image)
    for name, window in MODELS
    if "gemma" in name
    for method in ("before the LLM", "at layers 1 and 3")
    for image in (False, True)
    if window is None or method == "before the LLM" or not image
]


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize(("name", "window", "method", "image"), TURNS)
def test_a_second_turn_of_a_batch(name, window, method, image, positions):
    """It continues on the pruned cache, with text alone or with one more image for every sample."""
    model = built(name, window)
    batch = families.batch(name, model)
    generator = torch.Generator().manual_seed(5)
    after = torch.randint(FIRST_WORD, IMAGE, (len(batch), 6), generator=generator)
    pixels = torch.randn(len(batch), *batch.inputs["pixel_values"].shape[1:], generator=generator)
    if image:
        tokens = len(visual_columns(model, batch.singles[0]))
        columns = torch.tensor([START, *[IMAGE] * tokens, END]).expand(len(batch), -1)
        after = torch.cat([after[:, :2], columns, after[:, 2:]], 1)
    with session_on(model, method, positions) as session:
        first, reports = generate(model, batch.inputs), [session.report]
        answers = first.sequences[:, -NEW:]
        inputs = conversation(name, batch.inputs["input_ids"], answers, after)
        inputs["attention_mask"][:, : -NEW - after.shape[1]] = batch.inputs["attention_mask"]
        if image:
            inputs["pixel_values"] = pixels
        second = generate(model, inputs, **{CACHE: first[CACHE]})
        if image:
            reports.append(session.report)
    for sample, single in enumerate(batch.singles):
        own = slice(sample, sample + 1)
        whole = conversation(name, single["input_ids"], answers[own], after[own])
        whole["pixel_values"] = torch.cat([single["pixel_values"], pixels[own] if image else pixels[:0]])
        layers = [kept_columns(report, sample, batch.first_column(sample)) for report in reports]
        kept = [torch.cat(parts) for parts in zip(*layers, strict=True)]
        assert error(model, second, sample, whole, kept, positions) < ATOL


@pytest.mark.parametrize("wrong", [{"window_cuts_blocks": False}, {"blocks": lambda self, inputs: None}])
def test_the_comparison_would_notice_a_wrong_mask(monkeypatch, wrong):
    """Gemma 3 with PaliGemma's rule for blocks beyond the window, or without blocks."""
    model = built("gemma3", 8)
    inputs = families.batch("gemma3", model).singles[1]
    for name, value in wrong.items():
        monkeypatch.setattr(type(vtprune.adapter_for(model)), name, value)
    with session_on(model, "at layers 1 and 3", "original") as session:
        output = generate(model, inputs)
    assert error(model, output, 0, inputs, kept_columns(session.report, 0), "original") > 100 * ATOL
