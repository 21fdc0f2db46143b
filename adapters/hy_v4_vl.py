# SPDX-License-Identifier: Apache-2.0
"""Hunyuan 4: images and videos of any size, with 2x2 patches merged and a newline token behind every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import pad

from vtprune.adapters.qwen_vl import Qwen2VL, patch_grids
from vtprune.tokens import Grid, Medium


class HyV4VL(Qwen2VL):
    """`HYV4VLForConditionalGeneration` (Hunyuan 4; no paper).

    The patches of all media of a call are packed in one sequence, each frame in raster order. Tokens of a frame: one
    grid in raster order, with a newline token behind every row. The merger runs once for each image or video. Positions
    have three axes (M-RoPE). The language model has several streams of hidden states, and looks up in an index which
    columns a token attends to, which later layers share, so tokens can be dropped before it only.
    """

    model_types: ClassVar[tuple[str, ...]] = ("hy_v4_vl",)
    family = "Hunyuan 4"
    layout = "one grid an image or frame, rows with newlines"
    carries_state = True
    marker_columns = (1, 1)  # what chat templates put around images and videos, or two of them would look like one

    def vision_tower(self, kind: str = "image") -> nn.Module:
        return self.base.vision_tower

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_tower.layers

    def encoder_attention(self, layer: Any) -> nn.Module:
        return layer.self_attn

    @property
    def projector(self) -> Any:
        return self.base.vision_tower.patch_merger

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        side = self.vision_config.spatial_merge_size
        media = []
        for frames, rows, columns in patch_grids(kind, inputs).tolist():
            grid = Grid(rows // side, columns // side)
            crops = torch.arange(frames)[:, None, None].expand(-1, grid.rows, grid.cols)
            lines = torch.arange(frames * grid.rows).repeat_interleave(grid.cols + 1)
            media.append(Medium(pad(crops, (0, 1), value=-1).flatten(), (grid,) * frames, lines))
        return media

    def pictures(self, kind: str, inputs: Mapping[str, Any]) -> Sequence[Sequence[Tensor]]:
        pattern = "(t r c) (ch p q) -> t ch (r p) (c q)"
        sizes = {"ch": 3, "p": self._patch, "q": self._patch}
        grids = patch_grids(kind, inputs).tolist()
        return [
            [*rearrange(own, pattern, t=frames, r=rows, **sizes)]
            for own, (frames, rows, _) in zip(self.pixels(kind, inputs), grids, strict=True)
        ]

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        side, means = self.vision_config.spatial_merge_size, []
        grids = patch_grids(kind, inputs)
        parts = features.flatten(0, -2).split(grids.prod(1).tolist())
        for patches, (frames, rows, columns) in zip(parts, grids.tolist(), strict=True):
            cells = patches.unflatten(0, (frames, rows // side, side, columns // side, side)).mean((2, 4))
            means.append(pad(cells, (0, 0, 0, 1)).flatten(0, 2))
        return torch.cat(means)
