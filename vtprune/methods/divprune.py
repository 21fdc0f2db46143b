# SPDX-License-Identifier: Apache-2.0
"""DivPrune: keep the most diverse subset of the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.methods.base import BeforeLLM
from vtprune.ops.diversity import max_min_diversity
from vtprune.tokens import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class DivPrune(BeforeLLM):
    """Greedy max-min diversity in cosine distance over the projected features (arXiv 2503.02175).

    Stage: before the LLM. Positions are compact, as in the reference. Deviations: tokens are chosen for each image
    separately (the reference handles only one block of tokens in the first sample of a batch); a token is never chosen
    twice, even among duplicates. Published setting: keep_ratio=0.098.
    """

    name: ClassVar[str] = "divprune"
    signal: ClassVar[str] = "similarity"
    paper: ClassVar[str] = "arXiv 2503.02175"

    def select(self, tokens: VisualTokens) -> Selection:
        return Selection(max_min_diversity(tokens.features, tokens.valid, tokens.host.budget))
