# SPDX-License-Identifier: Apache-2.0
"""GLSim inside the encoder: drop the patches least similar to the image as a whole, a few in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtprune.methods.base import require_cls
from vtprune.methods.in_layers import DropInEveryLayer, LayerTokens
from vtprune.ops.similarity import similarity_to
from vtprune.tokens import ModelShape


@dataclass(frozen=True, kw_only=True)
class GLSimPatches(DropInEveryLayer):
    """Drops the patches least similar to the CLS token, behind every layer of the vision encoder (arXiv 2407.12891).

    Stage: inside the vision encoder, on the schedule of `tome`. No attention is looked at. The encoder puts out the
    tokens that are left, in their order. CLS, register and distillation tokens stay.
    Deviation: the reference scores the encoder's normalised output, to find the crop for a second pass; here the score
    is taken behind each layer, before the encoder's last normalisation. `glsim` scores before the LLM.

    Fields
        metric: "cosine" (default); or "l1" or "l2", by which small mean absolute or squared differences are similar.
    """

    name: ClassVar[str] = "glsim_patches"
    signal: ClassVar[str] = "similarity to CLS in the encoder"
    paper: ClassVar[str] = "arXiv 2407.12891"
    place = "behind"

    metric: Literal["cosine", "l1", "l2"] = "cosine"

    def check_budget(self, shape: ModelShape) -> None:
        super().check_budget(shape)
        require_cls(self.name, "ranks by similarity to", shape, others="tome, mctf, zero_tprune")

    def left(self, tokens: LayerTokens, count: int) -> Tensor:
        scores = similarity_to(tokens.hidden[:, 0], tokens.hidden[:, tokens.protected :], self.metric)
        return scores.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values
