# SPDX-License-Identifier: Apache-2.0
"""Baseline: keep every n-th token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.methods.base import BeforeLLM
from vtprune.tokens import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Uniform(BeforeLLM):
    """Keeps tokens at an even stride in raster order: the middle of each of k equal intervals.

    Stage: before the LLM.
    """

    name: ClassVar[str] = "uniform"
    signal: ClassVar[str] = "none"

    def select(self, tokens: VisualTokens) -> Selection:
        return Selection.of_indices(tokens, [even_stride(length, k) for _, length, k in tokens.each()])


def even_stride(length: int, k: int) -> Tensor:
    """(k,) long: the middle of each of k equal intervals of `length` places."""
    return (2 * torch.arange(k) + 1) * length // max(2 * k, 1)
