# SPDX-License-Identifier: Apache-2.0
"""Fuyu: patches of pixels, projected straight into the prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtprune.adapters.base import Adapter
from vtprune.tokens import Medium

_NO_ENCODER = "there is none: patches of pixels are projected straight into the prompt"


class Fuyu(Adapter):
    """`FuyuForCausalLM` (Fuyu-8B; no paper).

    Tokens of an image: its patches in raster order, each projected by one matrix. There is no vision encoder. Newline
    tokens, which are text, end the rows, and "bos" follows the last row. How many patches a row has is not among what
    the model is told, so that tokens have no grid. The language model (Persimmon's) projects queries, keys and values
    together. The processor hands on the patches of all images as one; it puts one image into a prompt.
    """

    model_types: ClassVar[tuple[str, ...]] = ("fuyu",)
    family = "Fuyu"
    layout = "no grid: patches of pixels"
    merges_in_encoder = False
    marker_columns = (0, 2)  # a newline token, "bos"
    gridless = "how many patches a row has is not among what the model is told"
    layers_unread = _NO_ENCODER
    features_unread = _NO_ENCODER
    images_joined = True
    encoder_uncounted = _NO_ENCODER

    @property
    def final_norm(self) -> nn.Module:
        return self.language_model.final_layernorm

    @property
    def vision_config(self) -> Any:
        return self.config

    def vision_tower(self, kind: str = "image") -> nn.Module:
        return self.base.vision_embed_tokens

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return ()

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> list[int]:
        return []

    def features_of(self, output: Any) -> Tensor:
        return _images(output.last_hidden_state)

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        return [Medium.without_grid(len(image)) for image in features]

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        pixels = inputs["pixel_values"]
        return _images(pixels) if torch.is_tensor(pixels) else pixels


def _images(patches: Tensor) -> Tensor:
    """Patches (images, patches, dim), or of all images (patches, dim), as the processor has them, as one image."""
    return patches if patches.ndim == 3 else patches[None]
