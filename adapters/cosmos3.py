# SPDX-License-Identifier: Apache-2.0
"""The reasoners of Cosmos 3: Omni is a Qwen3-VL, Edge has a tower like SigLIP 2's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor, nn

from vtprune.adapters.qwen_vl import Qwen3VL


class Cosmos3Omni(Qwen3VL):
    """`Cosmos3OmniForConditionalGeneration` (Cosmos 3; no paper): a Qwen3-VL. What generates is not loaded."""

    model_types: ClassVar[tuple[str, ...]] = ("cosmos3_omni",)
    family = "Cosmos3-Omni"


class Cosmos3Edge(Qwen3VL):
    """`Cosmos3EdgeForConditionalGeneration` (Cosmos 3; no paper).

    Tokens and time stamps as in Qwen3-VL, but every frame of a video has a grid of its own, and there is no DeepStack.
    """

    model_types: ClassVar[tuple[str, ...]] = ("cosmos3_edge",)
    family = "Cosmos3-Edge"
    layout = "one grid an image or frame"

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.visual.encoder.layers

    def encoder_attention(self, layer: Any) -> nn.Module:
        return layer.self_attn

    @property
    def projector(self) -> nn.Module:
        return self.base.projector

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        # Within a patch the channels come last.
        side = self.vision_config.patch_size
        return (
            rearrange(patches, "n (p q ch) -> n (ch p q)", p=side, q=side) for patches in super().pixels(kind, inputs)
        )
