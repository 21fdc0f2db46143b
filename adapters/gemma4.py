# SPDX-License-Identifier: Apache-2.0
"""Gemma 4: images and videos of any shape, embeddings a layer, and layers that read the keys of earlier ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import pad

from vtprune.adapters.base import PIXELS, Adapter
from vtprune.errors import UnsupportedStageError
from vtprune.tokens import Grid, Medium

POSITIONS = {"image": "image_position_ids", "video": "video_position_ids"}
"""Kind of medium -> the argument with column and row of each patch, -1 for padding."""


class Gemma4(Adapter):
    """`Gemma4ForConditionalGeneration` (no paper).

    An image keeps its shape. All images are padded to one number of patches; the mean of 3x3 patches becomes one token.
    Tokens of an image: one grid in raster order. Tokens of a video: one such grid a frame, with a time stamp, "start of
    image" and "end of image" around each; the first time stamp of a video counts as text. No CLS token.

    The last layers of the small ones (E2B, E4B) read the keys of the last full and the last sliding layer before them,
    so that nothing can be dropped behind these, and embeddings of each token are added in every layer. In the large
    ones the tokens of an image, or a frame, attend to one another in both directions in sliding layers alone, and
    within the window.
    """

    model_types: ClassVar[tuple[str, ...]] = ("gemma4",)
    family = "Gemma 4"
    kinds = ("image", "video")
    layout = "one grid an image or a frame"
    merges_in_encoder = False
    gated_encoder_mlp = True
    window_cuts_blocks = True
    block_kinds: ClassVar[tuple[str, ...] | None] = ("sliding_attention",)

    @classmethod
    def refuses(cls, config: Any) -> str | None:
        if config.vision_config is None:
            return "this checkpoint has no vision encoder"
        if config.get_text_config().use_bidirectional_attention == "all":
            return "all its tokens attend to one another in both directions, so it generates no text"
        return None

    @property
    def marker_token_ids(self) -> tuple[int, ...]:
        names = ("boi_token_id", "eoi_token_id", "boa_token_id", "audio_token_id", "eoa_token_index")
        return tuple(value for name in names if (value := getattr(self.config, name)) is not None)

    def blocks(self, inputs: Mapping[str, Any]) -> Tensor | None:
        types = inputs.get("mm_token_type_ids")
        if types is None or self.text_config.use_bidirectional_attention != "vision":
            return None
        visual = (types == 1) | (types == 2)
        begins = visual & ~pad(visual[:, :-1], (1, 0))
        return torch.where(visual, begins.cumsum(1) - 1, -1)

    @property
    def projector(self) -> nn.Module:
        return self.base.embed_vision

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> list[int]:
        # The encoder computes padding, too.
        return [inputs[PIXELS[kind]].shape[1]] * len(inputs[PIXELS[kind]])

    @property
    def _side(self) -> int:
        """Side of the square of patches that become one token."""
        return self.vision_config.pooling_kernel_size

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        if kind == "video" and "num_frames_per_video" not in inputs:
            raise UnsupportedStageError(
                "videos of Gemma 4 come as stacks in this release of transformers: take a newer one"
            )
        sizes = (inputs[POSITIONS[kind]].amax(1) + 1) // self._side
        grids = [Grid(rows, columns) for columns, rows in sizes.tolist()]
        return [Medium.of_grids(*part) for part in _by_medium(kind, inputs, grids)]

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        return [torch.stack(tuple(part)) for part in _by_medium(kind, inputs, inputs[PIXELS[kind]])]

    def pictures(self, kind: str, inputs: Mapping[str, Any]) -> Sequence[Sequence[Tensor]]:
        crops = [_picture(*crop) for crop in zip(inputs[PIXELS[kind]], inputs[POSITIONS[kind]], strict=True)]
        return [*_by_medium(kind, inputs, crops)]

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        return features  # padding is gone already

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        positions = inputs[POSITIONS[kind]].to(values.device)
        return torch.cat([self._means(*crop) for crop in zip(values, positions, strict=True)])

    def _means(self, values: Tensor, positions: Tensor) -> Tensor:
        """Means (tokens, dim) of the squares of patches of one crop, values (patches, dim), positions (patches, 2)."""
        real = (positions >= 0).all(-1)
        values, (column, row) = values[real], positions[real].div(self._side, rounding_mode="floor").unbind(-1)
        token = row * (column.max() + 1) + column
        sums = values.new_zeros(int(token.max()) + 1, values.shape[-1]).index_add(0, token, values)
        return sums / self._side**2


def _picture(patches: Tensor, positions: Tensor) -> Tensor:
    """(3, height, width) of one crop, patches (patches, pixels), positions (patches, 2)."""
    real = (positions >= 0).all(-1)
    columns, rows = positions[real].unbind(-1)
    placed = patches.new_zeros(int(rows.max()) + 1, int(columns.max()) + 1, patches.shape[-1])
    placed[rows, columns] = patches[real]
    side = math.isqrt(patches.shape[-1] // 3)
    return rearrange(placed, "r c (p q ch) -> ch (r p) (c q)", p=side, q=side)


def _by_medium(kind: str, inputs: Mapping[str, Any], crops: Sequence[Any]) -> Iterable[Sequence[Any]]:
    """Whatever there is one of for each image or frame, split by image or video."""
    if kind == "image":
        return [crops[i : i + 1] for i in range(len(crops))]
    counts = torch.as_tensor(inputs["num_frames_per_video"]).tolist()
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [crops[end - count : end] for count, end in zip(counts, ends, strict=True)]
