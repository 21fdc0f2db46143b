# SPDX-License-Identifier: Apache-2.0
"""Nemotron Omni: images of any size and videos, over a language model of Mamba, attention and experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from vtprune.adapters.base import PIXELS, Adapter, stack_sizes
from vtprune.tokens import Grid, Medium


class NemotronHOmni(Adapter):
    """`NemotronH_Omni_Reasoning_V3` (Nemotron 3 Nano Omni; no paper).

    Tokens of an image: one grid in raster order, with half the rows and columns of the patches; four neighbouring
    patches are stacked (pixel shuffle) and projected to one token. Tokens of a video: one such grid for every two
    frames, with text before each. Videos have the placeholder of images, so that a prompt has either. The encoder
    (C-RADIO) puts class and register tokens before the patches of each image, which are cut off. Layers of the language
    model (Nemotron-H) are Mamba2, attention without positions, experts or an MLP alone.
    """

    model_types: ClassVar[tuple[str, ...]] = ("nemotron_h_omni",)
    family = "Nemotron Omni"
    kinds = ("image", "video")
    layout = "one grid an image or two frames"
    merges_in_encoder = False
    carries_state = True
    encoder_uncounted = "it has class and register tokens, and patches of two frames"
    marker_columns = (1, 1)  # <img>, </img>

    @classmethod
    def refuses(cls, config: Any) -> str | None:
        if config.video_pruning_rate > 0:
            return (
                "its video_pruning_rate lets the model drop tokens of videos itself; load it with video_pruning_rate=0"
            )
        return None

    @property
    def language_model(self) -> nn.Module:
        return self.base.language_model.model

    @property
    def visual_token_ids(self) -> Mapping[str, int]:
        return {kind: self.config.image_token_id for kind in self.kinds}

    def rope(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        return None

    def vision_tower(self, kind: str = "image") -> nn.Module:
        return self.base.vision_model

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_model.encoder.layer

    def encoder_attention(self, layer: Any) -> nn.Module:
        return layer.attention

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> list[int]:
        return [rows * columns + self._prefix for rows, columns in self._patch_grids(kind, inputs)]

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        side = self._side
        grids = [Grid(rows // side, columns // side) for rows, columns in self._patch_grids(kind, inputs)]
        frames = 1 if kind == "image" else inputs[PIXELS[kind]].shape[-4]
        return [Medium.of_grids(*grids[start : start + frames]) for start in range(0, len(grids), frames)]

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        pixels = inputs[PIXELS[kind]]
        if kind == "video":
            return pixels
        return pixels.split([rows * columns for rows, columns in self._patch_grids(kind, inputs)])

    def pictures(self, kind: str, inputs: Mapping[str, Any]) -> Sequence[Sequence[Tensor]]:
        if kind == "video":
            frames = rearrange(inputs[PIXELS[kind]], "... (f ch) h w -> ... f ch h w", ch=3)
            return [*frames.mean(-4)]
        pattern, sizes = "(r c) (ch p q) -> ch (r p) (c q)", {"ch": 3, "p": self._patch, "q": self._patch}
        grids = self._patch_grids(kind, inputs)
        return [
            [rearrange(own, pattern, r=rows, **sizes)]
            for own, (rows, _) in zip(self.pixels(kind, inputs), grids, strict=True)
        ]

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        return features.flatten(0, -2).unflatten(-1, (self._side**2, -1)).mean(1)

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        sequences = values.flatten(0, 1).split(self.encoder_sequences(kind, inputs))
        pattern = "(rows a) (columns b) dim -> (rows columns) dim"
        return torch.cat(
            [
                reduce(one[self._prefix :].unflatten(0, grid), pattern, "mean", a=self._side, b=self._side)
                for one, grid in zip(sequences, self._patch_grids(kind, inputs), strict=True)
            ]
        )

    def _patch_grids(self, kind: str, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of patches of each sequence of a call."""
        if kind == "image":
            return stack_sizes(inputs["image_grid_hw"])
        videos, frames, _, height, width = inputs[PIXELS[kind]].shape
        return [(height // self._patch, width // self._patch)] * (videos * frames)

    @property
    def _side(self) -> int:
        """Of the square of patches that become one token."""
        return round(1 / self.config.downsample_ratio)

    @property
    def _prefix(self) -> int:
        """Tokens that the encoder puts before the patches of an image."""
        return self.vision_config.num_summary_tokens
