# SPDX-License-Identifier: Apache-2.0
"""FasterVLM: what the vision encoder attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.methods.base import BeforeLLM, Scorer
from vtprune.signals import EncoderSaliency
from vtprune.tokens import ModelShape, VisualTokens


@dataclass(frozen=True, kw_only=True)
class FasterVLM(Scorer, BeforeLLM):
    """Keeps the tokens that the CLS token attends to most, the mean over heads (arXiv 2412.01818, first version).

    Stage: before the LLM; text plays no part. Attention is that of the encoder layer whose output the projector reads
    (for LLaVA-1.5 the last but one, as in the reference). Where the encoder has no CLS token, tokens are ranked by the
    attention that they receive in the last layer, as the authors do in the paper's second version (`vispruner`).
    `vtc_cls` sums CLS attention over several layers. Deviations: tokens are dropped after the projector instead of
    before it, which changes nothing but the projector's (small) cost; of equal attention the lower index is kept, where
    the reference leaves it open.
    """

    name: ClassVar[str] = "fastervlm"
    signal: ClassVar[str] = "attention in the encoder"
    paper: ClassVar[str] = "arXiv 2412.01818"

    def signals(self, shape: ModelShape):
        return (EncoderSaliency(shape.feature_layer if shape.has_cls else shape.encoder_layers - 1),)

    def scores(self, tokens: VisualTokens) -> Tensor:
        (attention,) = self.signals(tokens.shape)
        return tokens[attention]
