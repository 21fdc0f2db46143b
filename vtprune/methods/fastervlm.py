# SPDX-License-Identifier: Apache-2.0
"""FasterVLM: what the vision encoder's CLS token attends to."""

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
    """Keeps the tokens with the largest CLS attention, averaged over heads (arXiv 2412.01818, first version).

    Stage: before the LLM, from attention in the encoder layer whose output the projector reads (for LLaVA-1.5 the last
    but one, as in the reference); text plays no part. `vtc_cls` sums the same attention over several layers. Needs an
    encoder with a CLS token. Deviations: tokens are dropped after the projector instead of before it, which changes
    nothing but the projector's (small) cost; of equal attention the lower index is kept, where the reference leaves it
    open.
    """

    name: ClassVar[str] = "fastervlm"
    signal: ClassVar[str] = "CLS attention in the encoder"
    paper: ClassVar[str] = "arXiv 2412.01818"

    def signals(self, shape: ModelShape):
        require_cls(self.name, "ranks by the attention of", shape)
        return (ClsAttention((shape.feature_layer,)),)

    def scores(self, tokens: VisualTokens) -> Tensor:
        return cls_score(tokens[ClsAttention((tokens.shape.feature_layer,))])
