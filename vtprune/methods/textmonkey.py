# SPDX-License-Identifier: Apache-2.0
"""TextMonkey: drop a token if a later token is similar to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtprune.methods.base import BeforeLLM, Scorer
from vtprune.ops.redundancy import similarity_to_later
from vtprune.tokens import VisualTokens

PUBLISHED_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class TextMonkey(Scorer, BeforeLLM):
    """Keeps the tokens that are least similar (cosine) to any later token (arXiv 2403.04473).

    Stage: before the LLM. Of several similar tokens the last one stays. This is only the token filter; the resampler
    that TextMonkey trains to gather the dropped tokens is left out. Deviations: the overview of a tiled image is
    filtered together with its tiles (the reference keeps all of it); the similarity of a zero vector is 0.

    Fields
        keep_ratio, keep_tokens: optional; without them the published 512 tokens of an image or video stay, or all
            tokens if there are fewer.
        scope: "image" (default, as in the reference: the tiles of an image are compared with one another), or "crop".
    """

    name: ClassVar[str] = "textmonkey"
    signal: ClassVar[str] = "similarity"
    paper: ClassVar[str] = "arXiv 2403.04473"
    needs_budget: ClassVar[bool] = False

    scope: Literal["crop", "image"] = "image"

    def budgets(self, lengths: Tensor, images: Tensor) -> Tensor:
        if self.keep_ratio is None and self.keep_tokens is None:
            return lengths.clamp(max=PUBLISHED_TOKENS)
        return super().budgets(lengths, images)

    def scores(self, tokens: VisualTokens) -> Tensor:
        return -similarity_to_later(tokens.features, tokens.valid)
