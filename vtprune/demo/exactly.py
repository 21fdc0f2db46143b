# SPDX-License-Identifier: Apache-2.0
"""The tokens that a person chose, as a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge

from vtprune.devices import send
from vtprune.errors import BudgetError, ConfigError, VTPruneError
from vtprune.methods.base import BeforeLLM
from vtprune.tokens import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Exactly(BeforeLLM):
    """Keeps the stated tokens before the LLM. It belongs to one prompt, so it has no name that files could give.

    Fields
        tokens: visual tokens of the prompt to keep, counted from 0 in its order, separators left out.
        of: how many there are, separators left out. A prompt with another number is refused.
    Raises BudgetError if a budget is given, ConfigError if a token is not among those that there are.
    """

    name = "exactly"
    signal = "a person's choice"
    needs_budget = False

    tokens: tuple[Annotated[int, Ge(0)], ...]
    of: Annotated[int, Ge(1)]
    scope: Literal["image"] = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_ratio is not None or self.keep_tokens is not None:
            raise BudgetError("exactly: the tokens are the budget; give no other one")
        if self.tokens and max(self.tokens) >= self.of:
            raise ConfigError(f"exactly: token {max(self.tokens)} of {self.of}, which are counted from 0")

    def select(self, tokens: VisualTokens) -> Selection:
        found = int(tokens.host.lengths.sum())
        if found != self.of:
            raise VTPruneError(f"exactly: the choice is among {self.of} visual tokens, and here are {found}")
        valid = tokens.valid.cpu()
        chosen = torch.zeros(found, dtype=torch.bool)
        chosen[list(self.tokens)] = True
        keep = torch.zeros_like(valid)
        keep[valid] = chosen
        return Selection(send(keep, tokens.valid.device))
