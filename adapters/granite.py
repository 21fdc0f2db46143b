# SPDX-License-Identifier: Apache-2.0
"""Granite 4 Vision: the layout of LLaVA-NeXT, with features of their own in many decoder layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from vtprune.adapters.llava_next import LlavaNext


class Granite4Vision(LlavaNext):
    """`Granite4VisionForConditionalGeneration` (Granite 4.0 Vision; no paper) with a SigLIP or CLIP vision tower.

    Like LLaVA-NeXT, but projectors with queries make fewer tokens of the patches: a token stands for a square of
    patches, and reads the window around it. Each projector reads a layer of the tower and feeds a decoder layer: its
    features are added to the visual tokens on that layer's input. What is chosen by is what enters the first layer.
    """

    model_types = ("granite4_vision",)
    family = "Granite 4 Vision"

    @classmethod
    def refuses(cls, config: Any) -> str | None:
        if (reason := super().refuses(config)) is not None:
            return reason
        if 0 not in _targets(config):
            return "none of its features enter the first decoder layer, so there is nothing to choose by"
        return None

    @property
    def side(self) -> int:
        """Number of tokens in a row of a crop, which is also the number in a column."""
        return int(super().side * Fraction(self.config.downsample_rate))

    @property
    def feature_layers(self) -> list[int]:
        depth = len(self.encoder_layers())
        read = [layer for layer, _ in self.config.deepstack_layer_map] + [self.config.spatial_vision_layer]
        return [layer % (depth + 1) - 1 for layer in read]

    @property
    def projector(self) -> nn.Module:
        """The one for the first decoder layer."""
        projectors = (*self.base.layerwise_projectors, *self.base.spatial_projectors)
        return dict(zip(_targets(self.config), projectors, strict=False))[0]

    def features_of(self, output: Any) -> Sequence[Tensor]:
        return dict(output.deepstack_features)[0]

    def pack(self, inputs: Mapping[str, Any], values: Tensor, newline: float) -> Sequence[Tensor]:
        return self.base.pack_image_features(
            values.split(self.crops(inputs)),
            inputs["image_sizes"],
            image_newline=values.new_full(values.shape[-1:], newline),
            **self.pack_options(inputs),
        )

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> list[int]:
        return [super().side ** 2] * sum(map(len, self.pixels(kind, inputs)))

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        return super().projector_inputs(kind, inputs, self._squares(features))

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        return super().patch_values(kind, inputs, self._squares(values))

    def _squares(self, values: Tensor) -> Tensor:
        """(crops, patches, dim) -> (crops, tokens, dim): means of the squares that tokens stand for."""
        side = super().side
        return adaptive_avg_pool2d(values.mT.unflatten(2, (side, side)), self.side).flatten(2).mT


def _targets(config: Any) -> list[int]:
    """Decoder layer that each projector feeds; of several for one layer the model takes the last."""
    return [*(layer for _, layer in config.deepstack_layer_map), *config.spatial_target_layers]
