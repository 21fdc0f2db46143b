# SPDX-License-Identifier: Apache-2.0
"""Gemma 4 without a vision encoder: patches of pixels are projected straight into the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vtprune.adapters.gemma4 import POSITIONS, Gemma4


class Gemma4Unified(Gemma4):
    """`Gemma4UnifiedForConditionalGeneration` (12B; no paper).

    Like Gemma 4, but a token is one large patch of pixels, with its place added. The tokens of an image, or a frame,
    attend to one another in both directions in all layers, and beyond the window.
    """

    model_types: ClassVar[tuple[str, ...]] = ("gemma4_unified",)
    family = "Gemma 4 Unified"
    window_cuts_blocks = False
    block_kinds: ClassVar[tuple[str, ...] | None] = None
    layers_unread = "it has no vision encoder"
    encoder_uncounted = "it has none, only a projection of pixels"

    def vision_tower(self, kind: str = "image") -> nn.Module:
        return self.base.embed_vision

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return ()

    @property
    def projector(self) -> nn.Module:
        return self.base.embed_vision.multimodal_embedder

    @property
    def _side(self) -> int:
        return 1

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        real = (inputs[POSITIONS[kind]] >= 0).all(-1)
        return features[real.to(features.device)]
