# SPDX-License-Identifier: Apache-2.0
"""Ernie 4.5 VL: images and videos of any size, two frames of a video in a token, and experts by kind of token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from vtprune.adapters.qwen_vl import Qwen2VL, patch_grids
from vtprune.tokens import Grid, Medium


class Ernie4_5VL(Qwen2VL):
    """`Ernie4_5_VLMoeForConditionalGeneration` (no paper).

    The patches of all media of a call are packed in one sequence, four neighbours next to one another; attention does
    not cross frames. The resampler makes one token of four neighbours, of a video in two frames. Tokens of an image:
    one grid in raster order, with half the rows and columns of the patches. Tokens of a video: one such grid for every
    two frames, one after another. No CLS token. Positions have three axes (M-RoPE). Visual tokens, and the tokens right
    around images and videos, have experts of their own.
    """

    model_types: ClassVar[tuple[str, ...]] = ("ernie4_5_vl_moe",)
    family = "Ernie 4.5 VL"

    @property
    def marker_token_ids(self) -> tuple[int, ...]:
        return tuple(
            getattr(self.config, f"{kind}_{end}_token_id") for kind in ("image", "video") for end in ("start", "end")
        )

    @property
    def position_axes(self) -> int:
        return 3  # also if the config leaves `mrope_section` to its default

    def vision_tower(self, kind: str = "image") -> nn.Module:
        return self.base.vision_tower

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_tower.blocks

    @property
    def projector(self) -> nn.Module:
        return self.base.resampler_model

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        side, together = self.vision_config.spatial_merge_size, self._frames_a_token(kind)
        return [
            Medium.of_grids(*[Grid(rows // side, columns // side)] * (frames // together))
            for frames, rows, columns in patch_grids(kind, inputs).tolist()
        ]

    def pictures(self, kind: str, inputs: Mapping[str, Any]) -> Sequence[Sequence[Tensor]] | None:
        if kind == "image":
            return None
        side, together = self.vision_config.spatial_merge_size, self._frames_a_token(kind)
        pattern = "(t f r c i j) (ch p q) -> t f ch (r i p) (c j q)"
        sizes = {"f": together, "i": side, "j": side, "ch": 3, "p": self._patch, "q": self._patch}
        grids = patch_grids(kind, inputs).tolist()
        return [
            [*rearrange(own, pattern, r=rows // side, c=columns // side, **sizes).mean(1)]
            for own, (_, rows, columns) in zip(self.pixels(kind, inputs), grids, strict=True)
        ]

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        squares, together = super().projector_inputs(kind, inputs, features), self._frames_a_token(kind)
        grids = patch_grids(kind, inputs)
        counts = (grids.prod(1) // self.vision_config.spatial_merge_size**2).tolist()
        return torch.cat(
            [
                tokens.view(frames // together, together, -1, tokens.shape[-1]).mean(1).flatten(0, 1)
                for tokens, frames in zip(squares.split(counts), grids[:, 0].tolist(), strict=True)
            ]
        )

    def _frames_a_token(self, kind: str) -> int:
        return self.vision_config.temporal_merge_size if kind == "video" else 1
