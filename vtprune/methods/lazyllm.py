# SPDX-License-Identifier: Apache-2.0
"""LazyLLM: what the last token attends to, chosen anew for every token, with a way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.methods.base import Reviving, Scorer, Share, Staged
from vtprune.signals import LastQueryAttention
from vtprune.tokens import ModelShape, VisualTokens


@dataclass(frozen=True, kw_only=True)
class LazyLLM(Scorer, Reviving, Staged):
    """Drops visual tokens in steps by the last token's attention, and chooses again for each token that is generated.

    LazyLLM (arXiv 2407.14057). Stage: inside the LLM, and decode. The score of a token is the attention that the last
    token pays to it in the layer before the cut, averaged over heads. A token that an earlier choice left out may come
    back: its hidden state was put aside, and it is computed in the layers after the cut beside the new token, so that
    no token is computed twice in a layer. Original positions are kept, as in the paper.
    Deviations (the paper has no code): only visual tokens come and go, text and newline tokens stay; every sample of a
    batch chooses for itself; at each step as many tokens pass a cut as in the prefill (the paper's percentile of what
    is there means the same).

    Fields
        layers: cuts on the input of these decoder layers, 0-based, ascending; default None: (9, 19, 28) of 32 layers
            (after 30, 60 and 90 % of the depth, as in the paper's figure), rescaled to the model's depth.
        schedule: share of the entering visual tokens that passes each cut, in [0, 1], not increasing; default (0.7,
            0.49, 0.343): 30 % of those present are left out each time. With a budget it is scaled to meet it.
    """

    name: ClassVar[str] = "lazyllm"
    signal: ClassVar[str] = "attention in the LLM, at every step"
    paper: ClassVar[str] = "arXiv 2407.14057"
    published_layers: ClassVar[tuple[int, ...]] = (9, 19, 28)

    schedule: tuple[Share, ...] = (0.7, 0.49, 0.343)

    def signals(self, shape: ModelShape):
        return tuple(LastQueryAttention(cut - 1) for cut in self.cuts(shape))

    def scores(self, tokens: VisualTokens) -> Tensor:
        return tokens[LastQueryAttention(tokens.layer - 1)].mean(1)
