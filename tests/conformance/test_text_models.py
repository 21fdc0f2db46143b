# SPDX-License-Identifier: Apache-2.0
"""Promises 2, 3 and 5 on every language model that people put below LLaVA's encoder: right, or refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vtprune
from vtprune.certificate import TESTED_TEXT_MODELS
from vtprune.errors import VTPruneError
from vtprune.signals import InstructionAttention, LastQueryAttention
from vtprune.testing import families
from vtprune.tokens import Selection
from vtprune.transformers_private import CACHE

from . import text_models
from .models import batch_of_three, prompts
from .reference import generate
from .text_models import BEFORE, EVERYTHING, REFUSED, SEEN_WHILE_RUNNING

pytestmark = pytest.mark.release

NEW = 4
SEEN: list = []


@dataclass(frozen=True, kw_only=True)
class Look(vtprune.InLLM):
    """Looks at attention before each layer but the first, and drops nothing."""

    name: ClassVar[str] = "look_everywhere"
    signal: ClassVar[str] = "-"
    before: bool = True
    """Also at the attention of the layer that runs next."""

    def cuts(self, shape):
        return tuple(range(1, shape.decoder_layers))

    def budgets(self, shape, entering, crops):
        return torch.full((shape.decoder_layers - 1, len(entering)), -1)

    def signals(self, shape):
        rows = tuple(LastQueryAttention(layer - 1) for layer in self.cuts(shape))
        return (*rows, InstructionAttention()) if self.before else rows

    def check_budget(self, shape):
        """None is needed."""

    def select(self, tokens):
        following = tokens[InstructionAttention()] if self.before else None
        SEEN.append((tokens.layer, tokens[LastQueryAttention(tokens.layer - 1)], following))
        return Selection(tokens.valid.clone())


def check_generation(name: str, method: dict) -> None:
    """A padded batch, on a cache: every step of every sample is what the model computes without the dropped columns."""
    model, batch = text_models.shared(name), batch_of_three(text_models.shared(name))
    with vtprune.prune(model, method | {"positions": "original"}) as session:
        output = generate(model, batch.inputs(), new_tokens=NEW)
    got, length, pads = torch.stack(output.logits, 1), max(map(len, batch.ids)), batch.pads()
    dropped = 0
    for sample, ids in enumerate(batch.ids):
        ids = torch.cat([ids, output.sequences[sample, length:-1]])
        kept = [session.report.kept(sample, layer) - pads[sample] for layer in range(text_models.LAYERS)]
        dropped += len(session.report.visual[sample]) - len(kept[-1])
        expected = text_models.with_columns_taken_out(model, ids, batch.images[sample], kept)[-NEW:]
        scale = max(float(expected.abs().max()), 1.0)
        torch.testing.assert_close(got[sample], expected, atol=2e-5 * scale, rtol=0)
    assert dropped > 0


@pytest.mark.parametrize("name", text_models.parameters(EVERYTHING, SEEN_WHILE_RUNNING, BEFORE))
def test_before_the_llm(name):
    check_generation(name, {"name": "divprune", "keep_ratio": 0.4})


@pytest.mark.parametrize("name", text_models.parameters(EVERYTHING, SEEN_WHILE_RUNNING))
def test_inside_the_llm(name):
    check_generation(name, {"name": "fastv", "layer": 2, "keep_ratio": 0.7})


@pytest.mark.parametrize("name", text_models.parameters(EVERYTHING, SEEN_WHILE_RUNNING, BEFORE))
def test_a_second_turn(name):
    """Text on the cache of the first turn: as if all had come at once, without what was dropped."""
    model = text_models.shared(name)
    first, more = prompts(model, "tItttt"), torch.tensor([[7, 8, 9, 10, 11]])
    with vtprune.prune(model, "divprune", keep_ratio=0.4, positions="original") as session:
        answer = model(**first.inputs(), use_cache=True)
        kept = [session.report.kept(0, layer) for layer in range(text_models.LAYERS)]
        cache = answer[CACHE]
        assert cache.get_seq_length() == len(first.ids[0])
        logits = model(input_ids=more, **{CACHE: cache}, use_cache=True).logits[0]
        assert cache.get_seq_length() == len(first.ids[0]) + more.shape[1]
    ids = torch.cat([first.ids[0], more[0]])
    expected = text_models.with_columns_taken_out(model, ids, first.images[0], kept)[-more.shape[1] :]
    torch.testing.assert_close(logits, expected, atol=2e-5 * max(float(expected.abs().max()), 1.0), rtol=0)


@pytest.mark.parametrize("name", text_models.parameters(EVERYTHING, SEEN_WHILE_RUNNING))
def test_rows_are_the_models_own(name):
    """In every layer, in a padded batch, the attention of the last token and of the question."""
    SEEN.clear()
    model, batch = text_models.shared(name), batch_of_three(text_models.shared(name))
    inputs = batch.inputs()
    attentions = model(**inputs, output_attentions=True, use_cache=False).attentions
    before = name in EVERYTHING
    with vtprune.prune(model, Look(before=before), strict=False):
        model(**inputs)
    assert [layer for layer, *_ in SEEN] == list(range(1, text_models.LAYERS))
    for layer, last, question in SEEN:
        for sample, row in enumerate(inputs["input_ids"] == text_models.models.IMAGE_TOKEN):
            visual = row.nonzero()[:, 0]
            expected = attentions[layer - 1][sample, :, -1, visual]
            assert expected.std() > 1e-3
            torch.testing.assert_close(last[sample, :, : len(visual)], expected, atol=1e-5, rtol=1e-4)
            if before:
                expected = attentions[layer][sample].mean(0)[visual[-1] + 1 :, visual].mean(0)
                torch.testing.assert_close(question[sample, : len(visual)], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", text_models.parameters(BEFORE, REFUSED))
def test_what_cannot_be_right_is_refused_when_the_session_opens(name):
    model = text_models.shared(name)
    reason = (BEFORE | REFUSED)[name]
    for method in ("fastv", "transprune"):
        with pytest.raises(VTPruneError, match=reason):
            vtprune.prune(model, method, keep_ratio=0.7)
    if name in REFUSED:
        with pytest.raises(VTPruneError, match=reason):
            vtprune.prune(model, "divprune", keep_ratio=0.7)


@pytest.mark.parametrize("name", text_models.parameters(SEEN_WHILE_RUNNING))
def test_what_is_needed_too_early_is_refused(name):
    with pytest.raises(VTPruneError, match="no input_layernorm"):
        vtprune.prune(text_models.shared(name), "transprune", keep_ratio=0.7)


def test_what_need_not_be_checked_is_what_is_tested_here():
    installed = [name for name in families.PRUNED_INSIDE if families.is_available(name)]
    built = [vtprune.adapter_for(families.build(name)) for name in installed]
    tested = {*EVERYTHING, *SEEN_WHILE_RUNNING} | {adapter.language_model.config.model_type for adapter in built}
    assert tested <= TESTED_TEXT_MODELS
    if len(installed) == len(families.PRUNED_INSIDE):
        assert tested == TESTED_TEXT_MODELS
