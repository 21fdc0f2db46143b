# SPDX-License-Identifier: Apache-2.0
"""Baseline: drop patches at an even stride, a few in every layer of the vision encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.methods.in_layers import DropInEveryLayer, LayerTokens
from vtprune.methods.uniform import even_stride


@dataclass(frozen=True, kw_only=True)
class UniformPatches(DropInEveryLayer):
    """Drops patches between attention and MLP of every layer of the vision encoder, on the schedule of `tome`.

    Stage: inside the vision encoder. Of the patches that reach a layer, in raster order, the middles of equal intervals
    stay as they are; nothing merges. The encoder puts out the tokens that are left, in their order. CLS, register and
    distillation tokens stay.
    """

    name: ClassVar[str] = "uniform_patches"
    signal: ClassVar[str] = "none"
    place = "between"

    def left(self, tokens: LayerTokens, count: int) -> Tensor:
        return even_stride(tokens.patches, count)
