# SPDX-License-Identifier: Apache-2.0
"""Attention rows that methods get, where attention is not simply causal, against eager `output_attentions`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import vtprune
from vtprune.signals import InstructionAttention, LastQueryAttention
from vtprune.testing import families
from vtprune.testing.recompute import visual_columns
from vtprune.tokens import Selection

pytestmark = pytest.mark.release

SEEN: list = []


@dataclass(frozen=True, kw_only=True)
class Look(vtprune.InLLM):
    """Reads attention before a layer, and drops nothing."""

    name: ClassVar[str] = "look"
    signal: ClassVar[str] = "-"
    layer: int = 2

    def cuts(self, shape):
        return (self.layer,)

    def budgets(self, shape, entering, crops):
        return torch.full((1, len(entering)), -1)

    def signals(self, shape):
        return (LastQueryAttention(self.layer - 1), InstructionAttention())

    def check_budget(self, shape):
        """None is needed."""

    def select(self, tokens):
        SEEN.append([tokens[request] for request in self.signals(None)])
        return Selection(tokens.valid.clone())


@functools.cache
def built(name: str, window: int | None, attention: str):
    return families.build(name, attention, **({} if window is None else {"sliding_window": window}))


def ends_with_image(model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    end = int(visual_columns(model, inputs)[-1]) + 1
    names = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    return inputs | {key: inputs[key][:, :end] for key in names if key in inputs}


# In Gemma 3 and PaliGemma 2 layer 2 is a sliding one and layer 3 a full one, in Gemma 4 the other way round; both are
# looked at in both ways.
MODELS = [
    ("gemma3", 512),
    ("gemma3", 24),
    ("gemma3", 6),
    ("paligemma", None),
    ("paligemma2", 512),
    ("paligemma2", 24),
    ("mistral3", 24),
    ("mistral3", 6),
    ("gemma4", 512),
    ("gemma4_31b", 24),
    ("gemma4_31b", 6),
    ("gemma4_unified", 24),
]


@pytest.mark.parametrize("prompt", ["left", "right", "ends with an image"])
@pytest.mark.parametrize("before", [None, "divprune"])
@pytest.mark.parametrize("layer", [3, 4])
@pytest.mark.parametrize(("name", "window"), MODELS)
@torch.no_grad()
def test_rows_are_those_of_eager_attention(name, window, layer, before, prompt):
    model, eager = (built(name, window, attention) for attention in ("sdpa", "eager"))
    if prompt in ("left", "right"):
        batch = families.batch(name, model, padding_side=prompt)
        inputs, singles = batch.inputs, batch.singles
    else:
        inputs = ends_with_image(model, families.batch(name, model).singles[1])
        singles = [inputs]
    SEEN.clear()
    earlier = [] if before is None else [{"name": before, "keep_ratio": 0.6}]
    with vtprune.prune(model, [*earlier, Look(layer=layer)], strict=False) as session:
        model(**inputs)
    ((last, instruction),) = SEEN
    if earlier:
        with vtprune.prune(eager, earlier):
            attentions = eager(**inputs, output_attentions=True).attentions
    else:
        attentions = eager(**inputs, output_attentions=True).attentions

    width = attentions[layer].shape[-1]
    for sample, single in enumerate(singles):
        real = inputs["attention_mask"][sample].nonzero().flatten()
        dropped = session.report.visual[sample][
            ~torch.isin(session.report.visual[sample], session.report.kept(sample, 0))
        ]
        columns = real[~torch.isin(real, dropped)]
        # The remaining tokens are at the right end of the sequence.
        places = columns if width == inputs["input_ids"].shape[1] else torch.arange(width - len(columns), width)
        visual = places[torch.isin(columns, session.report.kept(sample, 0))]
        n = len(visual)
        assert 0 < n <= len(visual_columns(model, single))

        expected = attentions[layer - 1][sample, :, places[-1], visual]
        torch.testing.assert_close(last[sample, :, :n], expected, atol=1e-5, rtol=0)
        ids = inputs["input_ids"][sample][columns]  # tokens around images have ids above those of words
        text = places[(places > visual[-1]) & (ids >= families.FIRST_WORD) & (ids < families.IMAGE)]
        rows = text if len(text) else places[-1:]
        expected = attentions[layer][sample].mean(0)[rows][:, visual].mean(0)
        torch.testing.assert_close(instruction[sample, :n], expected, atol=1e-5, rtol=0)
        assert not instruction[sample, n:].any() and not last[sample, :, n:].any()
