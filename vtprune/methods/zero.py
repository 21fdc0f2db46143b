# SPDX-License-Identifier: Apache-2.0
"""Baseline: drop all visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.methods.base import BeforeLLM
from vtprune.tokens import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Zero(BeforeLLM):
    """Drops every visual token. It shows what the language model answers from the text alone.

    Stage: before the LLM. It needs no budget, and ignores a given one.
    """

    name: ClassVar[str] = "zero"
    signal: ClassVar[str] = "none"
    needs_budget: ClassVar[bool] = False

    def budgets(self, lengths: Tensor, images: Tensor) -> Tensor:
        return torch.zeros_like(lengths)

    def select(self, tokens: VisualTokens) -> Selection:
        return Selection(torch.zeros_like(tokens.valid))
