# SPDX-License-Identifier: Apache-2.0
"""Perception LM: a thumbnail and tiles, or the frames of a video, side by side, pooled after the projector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from vtprune.adapters.base import PIXELS, Adapter
from vtprune.adapters.internvl import square
from vtprune.tokens import Medium


class PerceptionLM(Adapter):
    """`PerceptionLMForConditionalGeneration` (arXiv 2504.13180).

    An image is a thumbnail of the whole, then tiles of the same size, row by row; a video is its frames. Their tokens
    have no text between them. Tokens of a tile or frame: one grid in raster order. The encoder, of timm, may have a CLS
    token, which is cut off; each patch is projected, then neighbouring patches are averaged, `projector_pooling_ratio`
    in each direction. Rotary embeddings are in all layers of the encoder.
    """

    model_types: ClassVar[tuple[str, ...]] = ("perception_lm",)
    family = "Perception LM"
    kinds = ("image", "video")
    layout = "one grid a tile or frame, side by side"
    merges_in_encoder = False
    layers_unread = "it is a network of timm, whose attention calls no function of transformers"

    @property
    def vision_config(self) -> Any:
        # That of transformers names the network of timm, and little more.
        tower = self.base.vision_tower.timm_model
        return SimpleNamespace(
            model_type=self.config.vision_config.model_type,
            hidden_size=tower.embed_dim,
            intermediate_size=tower.blocks[0].mlp.fc1.out_features,
            num_hidden_layers=len(tower.blocks),
            num_channels=tower.in_chans,
            patch_size=tower.patch_embed.patch_size[0],
            image_size=tower.patch_embed.img_size[0],
        )

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_tower.timm_model.blocks

    def encoder_attention(self, layer: Any) -> nn.Module:
        return layer.attn

    @property
    def has_cls(self) -> bool:
        return self.config.vision_use_cls_token

    def encode_call(self, kind: str) -> tuple[nn.Module, str]:
        return self.base, "get_image_features"  # also of videos

    def encode(self, kind: str, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        arguments = {"pixel_values": inputs[PIXELS[kind]]}
        return arguments, self.base.get_image_features(**arguments, return_dict=True)

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> Sequence[int | tuple[int, ...]]:
        return super().encoder_sequences("image", inputs)

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        return inputs["pixel_values"]

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        count, tiles = inputs["pixel_values"].shape[:2]
        grids = [square(len(tile)) for tile in features]
        return [Medium.of_grids(*grids[first : first + tiles]) for first in range(0, count * tiles, tiles)]

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        return self.projector_inputs(kind, inputs, values)

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        side, ratio = square(features.shape[1]).rows, self.config.projector_pooling_ratio
        pooled = avg_pool2d(features.mT.unflatten(-1, (side, side)), ratio)
        return pooled.flatten(2).mT.flatten(0, 1)
