# SPDX-License-Identifier: Apache-2.0
"""What methods will leave of a prompt, from their budgets alone: no model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch

import torch

from vtprune.methods.base import AfterPrefill, BeforeLLM, InEncoder, InLLM, Method
from vtprune.methods.in_layers import InLayers
from vtprune.tokens import ModelShape


@dataclass(frozen=True)
class Prompt:
    """Lengths of one prompt."""

    visual: int
    """visual tokens"""
    crops: int
    """images, tiles or frames that these tokens come from"""
    text: int
    """all other tokens"""


def plan(methods: Sequence[Method], shape: ModelShape, prompt: Prompt) -> list[float] | None:
    """Visual tokens that will enter each decoder layer: (decoder layers,), or None if only the data decide.

    All crops are taken to be of one size, and separators to be tokens like others. If only the data decide what a
    method keeps, it is taken to meet its `keep_ratio` in every layer.

    Args:
        methods: as they are applied, in the order of the path.
        shape: of the model.
        prompt: of one sample.

    Raises:
        VTPruneError: the model does not support a method, or the budget cannot be met.
    """
    counts: list[float] = [prompt.visual] * shape.decoder_layers
    for method in methods:
        method.check_budget(shape)
        parts = method.parts(shape)
        for part in parts:
            part.signals(shape)
        left: list[float] | None = counts
        for part in parts:
            left = left_by(part, left, shape, prompt)
            if left is None:
                break
        if left is None:
            if method.keep_ratio is None:
                return None
            left = [count * method.keep_ratio for count in counts]
        counts = left
    return counts


@singledispatch
def left_by(part: Method, counts: list[float], shape: ModelShape, prompt: Prompt) -> list[float] | None:
    """What a part of a method leaves: visual tokens entering each decoder layer, or None if only the data decide.

    There is one function for each class of stages.

    Args:
        part: a method of one stage.
        counts: (decoder layers,), what the parts before it leave.
        shape: of the model.
        prompt: of one sample.
    """
    raise TypeError(f"{part.name}: {type(part).__name__} belongs to no stage")


@left_by.register
def _(part: InEncoder, counts: list[float], shape: ModelShape, prompt: Prompt) -> None:
    return None  # tokens are merged if they are alike


@left_by.register
def _(part: InLayers, counts: list[float], shape: ModelShape, prompt: Prompt) -> list[float] | None:
    if part.keep_ratio is None and part.keep_tokens is None:
        return None  # a schedule counts the encoder's patches, of which a prompt may have more than visual tokens
    kept = [part.patches_left(int(tokens)) for tokens in _groups(int(counts[0]), prompt.crops)[0]]
    return [sum(kept)] * shape.decoder_layers


@left_by.register
def _(part: BeforeLLM, counts: list[float], shape: ModelShape, prompt: Prompt) -> list[float] | None:
    kept = part.budgets(*_groups(int(counts[0]), 1 if part.scope == "image" else prompt.crops))
    return None if (kept < 0).any() else [int(kept.sum())] * shape.decoder_layers


@left_by.register
def _(part: InLLM, counts: list[float], shape: ModelShape, prompt: Prompt) -> list[float] | None:
    numbers = torch.tensor([[int(counts[0])], [prompt.crops], [prompt.visual]])
    budgets = part.prompt_budgets(shape, *numbers)[:, 0].tolist()
    if min(budgets) < 0:
        return None
    if part.masks:  # masked tokens are still computed
        return counts
    left = list(counts)
    for cut, budget in zip(part.cuts(shape), budgets, strict=True):
        left[cut:] = [min(count, budget) for count in left[cut:]]
    return left


@left_by.register
def _(part: AfterPrefill, counts: list[float], shape: ModelShape, prompt: Prompt) -> list[float]:
    return counts  # the prefill is over


def _groups(tokens: int, crops: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(crops,) tokens of each crop, and (crops,) the image that it is of, which is always the first."""
    lengths = torch.full((crops,), tokens // crops)
    lengths[: tokens % crops] += 1
    return lengths, torch.zeros(crops, dtype=torch.long)
