# SPDX-License-Identifier: Apache-2.0
"""FasterVLM: keep the tokens that the vision encoder's CLS token attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.methods.base import BeforeLLM, Scorer, require_cls
from vtprune.ops.cls_attention import cls_score
from vtprune.signals import ClsAttention
from vtprune.tokens import ModelShape, VisualTokens


@dataclass(frozen=True, kw_only=True)
class FasterVLM(Scorer, BeforeLLM):
    """Keeps the tokens with the largest CLS attention, averaged over heads (arXiv 2412.01818v1).

    Stage: before the LLM. Attention comes from the encoder layer whose output the projector reads (for LLaVA-1.5 the
    last but one, as in the reference). Text is not used. `vtc_cls` sums the same attention over several layers. The
    encoder needs a CLS token. Deviations: tokens are dropped after the projector and not before it, which changes only
    the projector's (small) cost; of equal attention the lower index is kept (in the reference the order is undefined).
    """

    name: ClassVar[str] = "fastervlm"
    signal: ClassVar[str] = "CLS attention in the encoder"
    paper: ClassVar[str] = "arXiv 2412.01818v1"

    def signals(self, shape: ModelShape):
        require_cls(self.name, "ranks by the attention of", shape)
        return (ClsAttention((shape.feature_layer,)),)

    def scores(self, tokens: VisualTokens) -> Tensor:
        return cls_score(tokens[ClsAttention((tokens.shape.feature_layer,))])
