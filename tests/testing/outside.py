# SPDX-License-Identifier: Apache-2.0
"""What a package outside brings: a method inside the LLM with a signal of its own, and one that merges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

import vtprune
from vtprune.signals import LayerSignal


@dataclass(frozen=True)
class StateNorm(LayerSignal):
    """(groups, tokens): length of what enters the layer, over the length of the sample's text on average."""

    def read_layer(self, view):
        norms = view.hidden.norm(dim=-1)
        text = view.real & ~view.visual
        average = (norms * text).sum(1) / text.sum(1)
        return view.groups.gather(norms / average[:, None])


@dataclass(frozen=True, kw_only=True)
class LongStates(vtprune.CutOnce):
    """Inside the LLM: keeps the tokens with the longest states."""

    name: ClassVar[str] = "long_states"
    signal: ClassVar[str] = "length of the states"

    share: float = 0.5

    def signals(self, shape):
        return (StateNorm(),)

    def scores(self, tokens):
        return tokens[StateNorm()]


def halves(tokens, weight: float):
    """Every token in the second half of what may stay goes into the one before the border, in part."""
    merging = vtprune.Merging(tokens)
    for group, length, count in tokens.each():
        keep = torch.arange(length) < count
        features = tokens.features[group, :length].clone()
        sources = torch.arange(length).masked_fill(~keep, count - 1)
        if 0 < count < length:
            features[count - 1] += weight * features[count:].sum(0)
        merging.put(group, length, keep, features, sources)
    return merging.selection


@dataclass(frozen=True, kw_only=True)
class Gathers(vtprune.BeforeLLM):
    """Before the LLM: the first tokens stay, and the last of them takes up a weighted sum of the others."""

    name: ClassVar[str] = "gathers"
    signal: ClassVar[str] = "-"

    weight: float = 0.2

    def select(self, tokens):
        return halves(tokens, self.weight)


@dataclass(frozen=True, kw_only=True)
class GathersInside(vtprune.CutOnce):
    """Inside the LLM: the same."""

    name: ClassVar[str] = "gathers_inside"
    signal: ClassVar[str] = "-"

    share: float = 0.5

    def select(self, tokens):
        return halves(tokens, 0.2)
