# SPDX-License-Identifier: Apache-2.0
"""FasterVLM: keep the tokens that the vision encoder attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.methods.base import BeforeLLM, Scorer
from vtprune.signals import EncoderSaliency
from vtprune.tokens import ModelShape, VisualTokens


@dataclass(frozen=True, kw_only=True)
class FasterVLM(Scorer, BeforeLLM):
    """Keeps the tokens with the largest CLS attention, averaged over heads (arXiv 2412.01818v1).

    Stage: before the LLM. Attention comes from the encoder layer whose output the projector reads (for LLaVA-1.5 the
    last but one, as in the reference). Text is not used. Where the encoder has no CLS token, tokens are ranked by the
    attention that they receive in the last layer, as in the paper's second version (`vispruner`). `vtc_cls` sums CLS
    attention over several layers. Deviations: tokens are dropped after the projector and not before it, which changes
    only the projector's (small) cost; of equal attention the lower index is kept (in the reference the order is
    undefined).
    """

    name: ClassVar[str] = "fastervlm"
    signal: ClassVar[str] = "attention in the encoder"
    paper: ClassVar[str] = "arXiv 2412.01818v1"

    def signals(self, shape: ModelShape):
        return (EncoderSaliency(shape.feature_layer if shape.has_cls else shape.encoder_layers - 1),)

    def scores(self, tokens: VisualTokens) -> Tensor:
        (attention,) = self.signals(tokens.shape)
        return tokens[attention]
