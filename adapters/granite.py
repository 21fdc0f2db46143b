# SPDX-License-Identifier: Apache-2.0
"""Granite 4 Vision and Granite Docling: the layouts of LLaVA-NeXT and Idefics3, with features added in many decoder
layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from vtprune.adapters.idefics3 import Idefics3
from vtprune.adapters.llava_next import LlavaNext
from vtprune.tokens import Grid, Medium


class Granite4Vision(LlavaNext):
    """`Granite4VisionForConditionalGeneration` (Granite 4.0 Vision; no paper) with a SigLIP or CLIP vision tower.

    Like LLaVA-NeXT, but projectors with queries make fewer tokens of the patches: a token stands for a square of
    patches, and reads the window around it. Each projector reads a layer of the tower and feeds a decoder layer: its
    features are added to the visual tokens on that layer's input. What is chosen by is what enters the first layer.
    """

    model_types: ClassVar[tuple[str, ...]] = ("granite4_vision",)
    family = "Granite 4 Vision"
    merges_in_encoder = False
    unmerged = "its projectors read several layers"

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
        read = [layer for layer, _ in self.config.deepstack_layer_map]
        read += [self.config.spatial_vision_layer] * len(self.config.spatial_target_layers)
        return [dict(zip(_targets(self.config), read, strict=True))[0] % (len(self.encoder_layers()) + 1) - 1]

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
        return super().projector_inputs(kind, inputs, squares(features, super().side, self.side))

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        return super().patch_values(kind, inputs, squares(values, super().side, self.side))


def _targets(config: Any) -> list[int]:
    """Decoder layer that each projector feeds; of several for one layer the model takes the last."""
    return [*(layer for _, layer in config.deepstack_layer_map), *config.spatial_target_layers]


class GraniteDocling(Idefics3):
    """`GraniteDoclingForConditionalGeneration` (Granite Docling; no paper).

    The tiles and the text between them are those of Idefics3. The connector stacks neighbouring patches, `scale_factor`
    in each direction, or half of it where the processor asks for the fine route, which the whole batch then takes.
    Features of earlier encoder layers are added to the visual tokens behind the first decoder layers (DeepStack).
    """

    model_types: ClassVar[tuple[str, ...]] = ("granite_docling",)
    family = "Granite Docling"
    unmerged = "its connector reads several layers"

    @property
    def projector(self) -> Any:
        return self.base.vision_model.connector

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        side = inputs["pixel_values"].shape[-1] // self._patch // self._merged(inputs)
        return [Medium.of_grids(Grid(side, side)) for _ in self.pixels(kind, inputs)]

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        return inputs["pixel_values"][inputs["pixel_attention_mask"]]

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        side = inputs["pixel_values"].shape[-1] // self._patch
        return squares(features, side, side // self._merged(inputs)).flatten(0, 1)

    def _merged(self, inputs: Mapping[str, Any]) -> int:
        """Patches in a row of the square that one token is made of."""
        scale = self.vision_config.scale_factor
        return scale if inputs.get("tile_fine_mask") is None else scale // 2


def squares(values: Tensor, side: int, left: int) -> Tensor:
    """(crops, side * side, dim) in raster order -> (crops, left * left, dim): means over squares of a coarser grid."""
    return adaptive_avg_pool2d(values.mT.unflatten(2, (side, side)), left).flatten(2).mT
