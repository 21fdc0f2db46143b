# SPDX-License-Identifier: Apache-2.0
"""Baseline: drop random patches, a few in every layer of the vision encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge
from torch import Tensor

from vtprune.methods.in_layers import DropInEveryLayer, LayerTokens
from vtprune.ops.seeded_random import seeded_uniform


@dataclass(frozen=True, kw_only=True)
class RandomPatches(DropInEveryLayer):
    """Drops random patches between attention and MLP of every layer of the vision encoder, on the schedule of `tome`.

    Stage: inside the vision encoder. Those that stay are as they were; nothing merges. The encoder puts out the tokens
    that are left, in their order. CLS, register and distillation tokens stay. A layer's draw depends on the seed, the
    layer and the number of patches: it is the same for all images, so compare several seeds.

    Fields
        seed: seed of the draws, >= 0, default 0.
    """

    name: ClassVar[str] = "random_patches"
    signal: ClassVar[str] = "none"
    place = "between"

    seed: Annotated[int, Ge(0)] = 0

    def left(self, tokens: LayerTokens, count: int) -> Tensor:
        (draws,) = seeded_uniform([tokens.layer], self.seed, tokens.patches)
        return draws.argsort()[tokens.patches - count :].sort().values
