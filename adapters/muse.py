# SPDX-License-Identifier: Apache-2.0
"""Muse Glimmer and Muse Spark: the layout of Qwen-VL, from a tower of their own, over layers without rotation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from vtprune.adapters.qwen_vl import Qwen2VL, patch_grids
from vtprune.tokens import Grid, Medium
from vtprune.transformers_private import muse_window_order


class Muse(Qwen2VL):
    """`MuseGlimmerForConditionalGeneration` and `MuseSparkForConditionalGeneration` (no papers).

    The patches of all media of a call are packed in one sequence, each medium in raster order. Most encoder layers
    attend within windows; the encoder sorts the patches by windows, and puts them back behind its last layer. Then 2x2
    neighbouring patches are stacked and projected to one token. Tokens of an image: one grid in raster order; of a
    video: one such grid for every two frames, with a time stamp before each. No CLS token. Positions have one axis, and
    some decoder layers do not use them. Muse Spark also takes audio, whose tokens are neither visual nor text.
    """

    model_types: ClassVar[tuple[str, ...]] = ("muse_glimmer", "muse_spark")
    family = "Muse"
    marker_columns = (1, 1)  # "image start", and "image end" or the end of a video

    def vision_tower(self, kind: str = "image") -> nn.Module:
        return self.base.vision_tower

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_tower.layers

    @property
    def projector(self) -> nn.Module:
        return self.base.vision_adapter

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        side = self.vision_config.merge_size
        return [
            Medium.of_grids(*[Grid(rows // side, columns // side)] * frames)
            for frames, rows, columns in patch_grids(kind, inputs).tolist()
        ]

    def pictures(self, kind: str, inputs: Mapping[str, Any]) -> Sequence[Sequence[Tensor]]:
        pattern = "(t r c) (f ch p q) -> t f ch (r p) (c q)"
        sizes = {"ch": 3, "p": self._patch, "q": self._patch}
        grids = patch_grids(kind, inputs).tolist()
        return [
            [*rearrange(own, pattern, t=frames, r=rows, **sizes).float().mean(1)]
            for own, (frames, rows, _) in zip(self.pixels(kind, inputs), grids, strict=True)
        ]

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        grids, side = patch_grids(kind, inputs), self.vision_config.merge_size
        raster = muse_window_order(grids, self.vision_config).argsort()
        merged = raster.to(values.device)[_merge_order(grids, side).to(values.device)]
        return values.flatten(0, 1)[merged].unflatten(0, (-1, side**2)).mean(1)

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        return features.unflatten(1, (-1, self.vision_config.merge_size**2)).mean(2)

    def markers(self, ids: Tensor | None, images: Tensor) -> Tensor:
        # All time stamps but the first are inside their video; how they begin shows where the first one does.
        found = super().markers(ids, images)
        if ids is None:
            return found
        for row, (tokens, numbers) in enumerate(zip(ids.tolist(), images.tolist(), strict=True)):
            of_videos = [n for token, n in zip(tokens, numbers, strict=True) if token == self.config.video_token_id]
            for start in (numbers.index(video) for video in set(of_videos) - {-1}):
                found[row, _first_stamp(tokens, numbers, start) : start] = True
        return found


def _merge_order(grids: Tensor, side: int) -> Tensor:
    """(patches,) long: the patches of (media, 3) grids, those next to one another that become one token."""
    parts, start = [], 0
    for frames, rows, columns in grids.tolist():
        patches = torch.arange(start, start + frames * rows * columns)
        parts.append(patches.view(frames, rows // side, side, columns // side, side).transpose(2, 3).flatten())
        start += len(patches)
    return torch.cat(parts)


def _first_stamp(tokens: list[int], numbers: list[int], start: int) -> int:
    """The column of the "video start" before the first time stamp of a video; `start` if it is not found.

    tokens: the ids of a sample. numbers: the medium of each column, -1 for none. start: the video's first token.
    """
    video = numbers[start]
    inside = next((c for c in range(start, len(numbers)) if numbers[c] != video), len(numbers))
    if video not in numbers[inside:]:
        return start
    # Between its frames come a separator and a stamp at least as long as the first one.
    opening, length = tokens[inside + 1], numbers.index(video, inside) - inside - 1
    near = [column for column in range(max(start - length, 1), start) if tokens[column] == opening]
    return near[-1] - 1 if near else start
