# SPDX-License-Identifier: Apache-2.0
"""LazyLLM: keep the tokens that the last token attends to most; choose again for every generated token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.methods.base import Scorer, Share
from vtprune.methods.schedules import Reviving, Staged
from vtprune.signals import LastQueryAttention
from vtprune.tokens import ModelShape, VisualTokens


@dataclass(frozen=True, kw_only=True)
class LazyLLM(Scorer, Reviving, Staged):
    """Drops visual tokens in steps by the last token's attention, and chooses again for each token that is generated.

    LazyLLM (arXiv 2407.14057). Stages: inside the LLM, and decode. The score of a token is the attention that the last
    token pays to it in the layer before the cut, averaged over heads. A token that was dropped at an earlier step may
    come back: its hidden state is stored, and the layers after the cut compute it together with the new token. So no
    token is computed twice in a layer. Original positions are kept, as in the paper.
    Deviations (the paper has no code): only visual tokens are dropped and come back, text and newline tokens stay;
    tokens are chosen for every sample of a batch separately; at each step as many tokens pass a cut as in the prefill
    (the paper's percentile of the present tokens means the same).

    Fields
        layers: cuts on the input of these decoder layers, 0-based, ascending; default None: (9, 19, 28) of 32 layers
            (after 30, 60 and 90 % of the depth, as in the paper's figure), rescaled to the model's depth.
        schedule: share of the entering visual tokens that passes each cut, in [0, 1], not increasing; default (0.7,
            0.49, 0.343): each cut drops 30 % of the present tokens. With a budget the schedule is scaled to meet it.
    """

    name: ClassVar[str] = "lazyllm"
    signal: ClassVar[str] = "attention in the LLM, at every step"
    paper: ClassVar[str] = "arXiv 2407.14057"
    text_aware: ClassVar[bool] = True
    published_layers: ClassVar[tuple[int, ...]] = (9, 19, 28)

    schedule: tuple[Share, ...] = (0.7, 0.49, 0.343)

    def signals(self, shape: ModelShape):
        return tuple(LastQueryAttention(cut - 1) for cut in self.cuts(shape))

    def scores(self, tokens: VisualTokens) -> Tensor:
        return tokens[LastQueryAttention(tokens.layer - 1)].mean(1)
