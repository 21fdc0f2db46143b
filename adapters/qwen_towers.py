# SPDX-License-Identifier: Apache-2.0
"""EXAONE 4.5 and HyperCLOVA X: the tower of Qwen2.5-VL over other language models, whose positions have one axis.

In a batch these models count positions from the padding on the left on. That changes no attention, but the lengths of
rotated keys, so `dart`, which goes by these, may choose other tokens in a batch than alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from vtprune.adapters.qwen_vl import Qwen2_5_VL


class Exaone4_5(Qwen2_5_VL):
    """`Exaone4_5_ForConditionalGeneration` (EXAONE 4.5; no paper).

    Like Qwen2.5-VL, with grouped-query attention in the encoder and without M-RoPE. Decoder layers of EXAONE 4 have no
    norm before their attention, so methods that compute it ahead are refused.
    """

    model_types: ClassVar[tuple[str, ...]] = ("exaone4_5",)
    family = "EXAONE 4.5"
    marker_columns = (1, 1)  # what chat templates put around images and videos


class HyperClovaX(Qwen2_5_VL):
    """`HyperCLOVAXVisionV2ForConditionalGeneration` (HyperCLOVA X SEED Think; no paper).

    Like Qwen2.5-VL, with a second projector behind the merger, and without M-RoPE.
    """

    model_types: ClassVar[tuple[str, ...]] = ("hyperclovax_vision_v2",)
    family = "HyperCLOVA X SEED"
    marker_columns = (1, 1)  # what chat templates put around images and videos

    def vision_tower(self, kind: str = "image") -> nn.Module:
        return self.base.vision_model

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_model.blocks

    @property
    def projector(self) -> nn.Module:
        return self.base.vision_model.merger
