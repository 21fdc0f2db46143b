# SPDX-License-Identifier: Apache-2.0
"""The `downsample` baseline: a smaller image, or fewer frames, instead of fewer tokens of the whole image.

An image is prepared as always (resized, cropped), then made so small that its patches fill the grid that the budget
allows. Encoder, projector and LLM run on these patches only. The encoder's position embeddings are interpolated to the
smaller grid by the `interpolate_pos_encoding` of transformers. Nothing is enlarged again, so the token counts are equal
to those of a pruning method. The encoder gets cheaper as well, which no pruning method before the LLM achieves.
(VTC-Bench, arXiv 2510.07143, found this baseline above many methods.)

For a video the processor samples fewer frames. The frames are not made smaller, because LLaVA-OneVision, for example,
lays out every frame in the grid that its configuration states.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from PIL import Image

import vtprune
from vtprune.errors import BudgetError, UnsupportedStageError
from vtprune.eval.inputs.prompts import conversation_inputs, processed_view
from vtprune.eval.tasks import Conversation, Kind, kinds_of


def grid_for(rows: int, cols: int, keep_ratio: float) -> tuple[int, int]:
    """The grid whose number of cells is nearest to `keep_ratio * rows * cols`.

    Sides are whole patches and shrink alike: each is the floor or the ceiling of its exact length. If two grids
    are equally near, the one with the image's shape is taken, as nearly as possible.

    Returns:
        (rows, cols), each at least 1.
    """
    wanted, scale = keep_ratio * rows * cols, keep_ratio**0.5

    def sides(length: int) -> list[int]:
        return sorted({max(1, int(length * scale)), min(length, int(length * scale) + 1)})

    candidates = [(r, c) for r in sides(rows) for c in sides(cols)]
    return min(candidates, key=lambda grid: (abs(grid[0] * grid[1] - wanted), abs(grid[0] * cols - grid[1] * rows)))


class Downsampler:
    """Makes smaller images for a LLaVA model with a CLIP or SigLIP encoder, as a budget says.

    Args:
        model: a model with an adapter, whose vision tower takes `interpolate_pos_encoding`.
        processor: its processor.
        keep_ratio: share of the visual tokens, in (0, 1). A grid of whole patches meets it as nearly as possible.

    Raises:
        UnsupportedStageError: the encoder cannot take images of another size.
    """

    def __init__(self, model: Any, processor: Any, keep_ratio: float):
        self.processor = processor
        adapter = vtprune.adapter_for(model)
        self.tower = adapter.vision_tower()
        full = adapter.image_grid
        if full is None or "interpolate_pos_encoding" not in inspect.signature(self.tower.forward).parameters:
            raise UnsupportedStageError(
                f"downsample needs one grid of patches an image and an encoder that interpolates its position "
                f"embeddings; {type(model).__name__} with {type(self.tower).__name__} has not"
            )
        self.patch = self.tower.config.patch_size
        self.grid = grid_for(full.rows, full.cols, keep_ratio)

    def inputs(self, conversations: Sequence[Conversation]) -> Any:
        """Like `conversation_inputs`, with every image smaller.

        Pixels are (images, channels, rows * patch, cols * patch), and there is one image token for each patch. Raises
        UnsupportedStageError if a prompt has videos.
        """
        _refuse_others(conversations, "image")
        small = [[turn | {"content": list(map(self._smaller, turn["content"]))} for turn in c] for c in conversations]
        return conversation_inputs(self.processor, small, do_resize=False, do_center_crop=False)

    def _smaller(self, part: dict[str, Any]) -> dict[str, Any]:
        """A part of a prompt; an image is as small as the grid says."""
        if part["type"] != "image":
            return part
        rows, cols = self.grid
        size = (cols * self.patch, rows * self.patch)
        return part | {"image": processed_view(self.processor, part["image"]).resize(size, Image.Resampling.BICUBIC)}

    @contextmanager
    def interpolated(self) -> Iterator[None]:
        """While the context is open, the encoder takes images of any size. LLaVA's forward has no argument for it."""
        handle = self.tower.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "interpolate_pos_encoding": True}), with_kwargs=True
        )
        try:
            yield
        finally:
            handle.remove()


class FewerFrames:
    """Makes inputs of fewer frames of a video; the counterpart of `Downsampler`.

    Args:
        processor: one that samples a fixed number of frames from every video.
        keep_ratio: share of those frames, in (0, 1). Whole frames meet it as nearly as possible.

    Raises:
        UnsupportedStageError: the processor samples by frame rate, or not at all.
        BudgetError: less than one frame.
    """

    def __init__(self, processor: Any, keep_ratio: float):
        self.processor = processor
        video_processor = processor.video_processor
        usual = video_processor.num_frames
        if not video_processor.do_sample_frames or usual is None:
            raise UnsupportedStageError(
                "downsample of videos needs a processor that samples a fixed number of frames, set by do_sample_frames "
                "and num_frames"
            )
        if keep_ratio * usual < 1:
            raise BudgetError(
                f"downsample keeps whole frames, so of {usual} it cannot keep less than {1 / usual:.1%}; "
                f"{keep_ratio:.1%} was asked for",
                floor=1 / usual,
            )
        self.frames = round(keep_ratio * usual)

    def inputs(self, conversations: Sequence[Conversation]) -> Any:
        """Like `conversation_inputs`, with `self.frames` frames of each video.

        Raises UnsupportedStageError if a prompt has images.
        """
        _refuse_others(conversations, "video")
        return conversation_inputs(self.processor, conversations, num_frames=self.frames)


def _refuse_others(conversations: Sequence[Conversation], kind: Kind) -> None:
    if any(kinds_of(conversation) - {kind} for conversation in conversations):
        raise UnsupportedStageError("downsample takes images or videos, not both in one task")
