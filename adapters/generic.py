# SPDX-License-Identifier: Apache-2.0
"""A model whose images are placeholders of the prompt, as far as it can be read off the model itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtprune.adapters.base import PIXELS, Adapter
from vtprune.adapters.qwen_vl import patch_grids
from vtprune.errors import UnsupportedModelError, UnsupportedStageError
from vtprune.tokens import Grid, Medium, ModelShape

_TOWERS = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_tower")
_PLACEHOLDERS = ("image_token_id", "image_token_index", "image_patch_id")


class Generic(Adapter):
    """Base of adapters for placeholder models with nothing special, and the adapter behind `adapter="generic"`.

    Read off the model: its base, its language model, the placeholder id, rotations, and from `image_grid_thw` the grid
    of each image. An image without it is one group of tokens without places. What nothing in a model tells is not
    known: crops, newline tokens (which count as content), marker tokens, videos and the vision encoder. A family that
    has these states them in an adapter of its own, which may derive from this class.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    family = "generic"
    layout = "one group an image; a grid if the call has `image_grid_thw`"
    merges_in_encoder = False
    layers_unread = "the generic adapter does not know which patches become which visual token"
    features_unread = layers_unread
    encoder_uncounted = "the generic adapter does not know the encoder"

    @classmethod
    def signals(cls) -> tuple[str, ...]:
        return ()

    @property
    def base(self) -> Any:
        for module in (self.model.base_model, self.model):
            if (
                hasattr(module, "get_image_features")
                and PIXELS["image"] in inspect.signature(module.forward).parameters
            ):
                return module
        raise UnsupportedModelError(
            f"a {type(self.model).__name__} has no module with `get_image_features` and a forward that takes pixels"
        )

    @property
    def visual_token_ids(self) -> Mapping[str, int]:
        for name in _PLACEHOLDERS:
            if isinstance(value := getattr(self.config, name, None), int):
                return {"image": value}
        raise UnsupportedModelError(f"the config of a {type(self.model).__name__} names no placeholder id of images")

    def vision_tower(self, kind: str = "image") -> Any:
        return next((tower for name in _TOWERS if (tower := getattr(self.base, name, None)) is not None), self.base)

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return ()

    @property
    def vision_config(self) -> Any:
        return getattr(self.config, "vision_config", None)

    @property
    def has_clip_tower(self) -> bool:
        return False

    @property
    def shape(self) -> ModelShape:
        return ModelShape(0, len(self.decoder_layers), 0, False)

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> list[int]:
        return []

    def pixel_argument(self, kind: str, inputs: Mapping[str, Any]) -> Tensor | None:
        pixels = super().pixel_argument(kind, inputs)
        if kind not in self.kinds and pixels is not None:
            raise UnsupportedStageError(f"the adapter {type(self).__name__} knows no {kind}s; pass images only")
        return pixels

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        if inputs.get(f"{kind}_grid_thw") is None:
            return [Medium.without_grid(len(image.flatten(0, -2))) for image in self._by_image(kind, inputs, features)]
        side = getattr(self.vision_config, "spatial_merge_size", 1)
        media = [
            Medium.of_grids(*[Grid(rows // side, columns // side)] * frames)
            for frames, rows, columns in patch_grids(kind, inputs).tolist()
        ]
        parts = [features] if torch.is_tensor(features) else features
        tokens, given = sum(map(len, media)), sum(part[..., 0].numel() for part in parts)
        if tokens != given:
            raise UnsupportedStageError(f"{kind}_grid_thw says {tokens} visual tokens, and {given} were encoded")
        return media

    def _by_image(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> Sequence[Tensor]:
        """The features of each image of a call."""
        images = len(inputs[PIXELS[kind]])
        if torch.is_tensor(features) and features.ndim == 2:  # of all images in one row
            if len(features) % images:
                raise UnsupportedStageError(f"{len(features)} visual tokens cannot be shared out among {images} images")
            return features.chunk(images)
        if len(features) != images:
            raise UnsupportedStageError(f"{images} images were encoded as {len(features)} pieces")
        return features

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        pixels = inputs[PIXELS[kind]]
        if inputs.get(f"{kind}_grid_thw") is None:
            return pixels
        return pixels.split(patch_grids(kind, inputs).prod(1).tolist())
