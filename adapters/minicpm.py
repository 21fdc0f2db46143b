# SPDX-License-Identifier: Apache-2.0
"""MiniCPM-V 4.6, MiniCPM-V 4.7 and MiniCPM-OCR: an image and its slices, with text around each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from vtprune.adapters.base import PIXELS, Adapter, stack_sizes
from vtprune.tokens import Grid, Medium

_SIZES = {"image": "target_sizes", "video": "target_sizes_videos"}


class MiniCPMV(Adapter):
    """`MiniCPMV4_6ForConditionalGeneration` and `MiniCPMOcrForConditionalGeneration` (no paper).

    An image comes in a small size, and then, if it is large, in slices row by row. Text tokens are around each of
    these, so each is a separate medium; their sizes differ. Frames of videos come as images do. Tokens of a medium: one
    grid in raster order. Behind the encoder layer `insert_layer_id`, 2x2 neighbouring patches become one, and the
    merger makes one token of each 2x2 of what the last layer puts out. With `downsample_mode="4x"`, only the merger
    does so. The patches of all media of a call are packed in one sequence, in which media do not attend to one another.
    No CLS token. Most layers of the language model (Qwen3.5's) are linear attention, whose state every token changes.
    """

    model_types: ClassVar[tuple[str, ...]] = ("minicpmv4_6", "minicpm_ocr")
    family = "MiniCPM-V 4.6, MiniCPM-OCR"
    kinds = ("image", "video")
    layout = "one grid an image, slice or frame, text between them"
    merges_in_encoder = False
    carries_state = True
    marker_columns = (1, 1)  # "start of image" or "start of slice", and its end

    @property
    def projector(self) -> Any:
        return self.base.merger

    def markers(self, ids: Tensor | None, images: Tensor) -> Tensor:
        # The config has no ids of the tokens around images. But the first image of a prompt is no slice, and shows what
        # comes before one. Line breaks between rows of slices are behind a slice and before one.
        found = super().markers(ids, images)
        if ids is None:
            return found
        special = (ids >= min(self.visual_token_ids.values())).tolist()
        for row, (tokens, numbers) in enumerate(zip(ids.tolist(), images.tolist(), strict=True)):
            starts = [c for c in range(1, len(numbers)) if numbers[c] >= 0 and numbers[c] != numbers[c - 1]]
            for start in starts:
                opener = start - 1
                if tokens[opener] != tokens[starts[0] - 1]:
                    found[row, _behind(numbers, opener) : opener] = True
                else:
                    found[row, _number_tag(special[row], opener) : opener] = True
        return found

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        rows, columns = self._side(inputs)
        return [
            Medium.of_grids(Grid(height // rows, width // columns))
            for height, width in stack_sizes(inputs[_SIZES[kind]])
        ]

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        pixels, sizes = inputs[PIXELS[kind]], stack_sizes(inputs[_SIZES[kind]])
        return pixels[0].split([height * width * pixels.shape[2] for height, width in sizes], -1)

    def pictures(self, kind: str, inputs: Mapping[str, Any]) -> Sequence[Sequence[Tensor]]:
        sizes = stack_sizes(inputs[_SIZES[kind]])
        pattern = "ch p (r c q) -> ch (r p) (c q)"
        return [
            [rearrange(own, pattern, r=rows, c=columns)]
            for own, (rows, columns) in zip(self.pixels(kind, inputs), sizes, strict=True)
        ]

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> Sequence[int | tuple[int, ...]]:
        patches = [height * width for height, width in stack_sizes(inputs[_SIZES[kind]])]
        if not self._merges_between(inputs):
            return patches
        whole = self.config.insert_layer_id + 1
        after = len(self.encoder_layers()) - whole
        return [(*[count] * whole, *[count // 4] * after) for count in patches]

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        sizes, side = stack_sizes(inputs[_SIZES[kind]]), self._side(inputs)
        whole = sum(height * width for height, width in sizes)
        if features.shape[1] < whole:  # 2x2 patches are one already
            sizes, side = [(height // 2, width // 2) for height, width in sizes], (side[0] // 2, side[1] // 2)
        parts = features[0].split([height * width for height, width in sizes])
        grids = [part.unflatten(0, size) for part, size in zip(parts, sizes, strict=True)]
        return torch.cat(
            [grid.unflatten(1, (-1, side[1])).unflatten(0, (-1, side[0])).mean((1, 3)).flatten(0, 1) for grid in grids]
        )

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        return self.projector_inputs(kind, inputs, values)

    def _merges_between(self, inputs: Mapping[str, Any]) -> bool:
        """Whether 2x2 patches become one between layers of the encoder in a call."""
        return (inputs.get("downsample_mode") or self.config.downsample_mode) != "4x"

    def _side(self, inputs: Mapping[str, Any]) -> tuple[int, int]:
        """How many rows and columns of patches become one token in a call."""
        rows, columns = (side**self.config.merger_times for side in self.config.merge_kernel_size)
        return (2 * rows, 2 * columns) if self._merges_between(inputs) else (rows, columns)


class MiniCPMV4_7(MiniCPMV):
    """`MiniCPMV4_7ForConditionalGeneration` (no paper).

    Like MiniCPM-V 4.6, but positions have three axes (M-RoPE), with the slices of an image on one canvas.
    """

    model_types: ClassVar[tuple[str, ...]] = ("minicpmv4_7",)
    family = "MiniCPM-V 4.7"


def _behind(numbers: list[int], column: int) -> int:
    """The first column behind the last medium before a column. numbers: the medium of each column, -1 for none."""
    while column > 0 and numbers[column - 1] < 0:
        column -= 1
    return column


def _number_tag(special: list[bool], opener: int) -> int:
    """The column where the number of an image begins, which stands between two special tokens right before its opener;
    `opener` if there is none. special: whether each column may hold a special token."""
    column = opener - 2
    while column >= 0 and not special[column] and opener - column <= 5:
        column -= 1
    tagged = opener - 3 >= column >= 0 and special[column] and special[opener - 1]
    return column if tagged else opener
