# SPDX-License-Identifier: Apache-2.0
"""A model's inputs from media and questions, through the processor's own chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

from vtprune.eval.inputs.videos import decoding_with_pyav
from vtprune.eval.tasks import Kind

CACHE_BYTES = 1 << 30


def chat_inputs(
    processor: Any,
    media: Sequence[Image.Image] | Sequence[str | Path],
    questions: Sequence[str],
    kind: Kind = "image",
    **processor_kwargs: Any,
) -> Any:
    """One user turn an image or video: the medium, then the question, with the generation prompt behind it.

    Args:
        processor: a processor with a chat template.
        media: RGB images, or paths of video files, one a prompt. The processor samples the frames of a video.
        questions: as many texts.
        kind: what the media are.
        processor_kwargs: passed on, e.g. `do_resize=False`.

    Returns:
        BatchFeature of tensors: `input_ids` and `attention_mask` (batch, tokens), padded on the left because generation
        continues on the right; `pixel_values` (batch, channels, height, width), or `pixel_values_videos` (batch,
        frames, channels, height, width); both as the processor lays them out, LLaVA's layout given here.
    """
    shown = [{"type": kind, kind: medium if kind == "image" else str(medium)} for medium in media]
    conversations = [
        [{"role": "user", "content": [medium, {"type": "text", "text": question}]}]
        for medium, question in zip(shown, questions, strict=True)
    ]
    return conversation_inputs(processor, conversations, **processor_kwargs)


def conversation_inputs(processor: Any, conversations: Sequence[Sequence[dict]], **processor_kwargs: Any) -> Any:
    """Whole conversations as inputs, with the generation prompt behind them.

    Args:
        processor: a processor. Without a chat template (PaliGemma) a prompt is the markers of its images and its text.
        conversations: turns with a `role` and a `content`: parts of `type` image, video or text.
        processor_kwargs: passed on, e.g. `num_frames=32`.

    Returns:
        As `chat_inputs`, for any number of media a prompt.
    """
    options = {"padding": True, "padding_side": "left", **processor_kwargs}
    if processor.chat_template is None:
        parts = [[part for turn in turns for part in turn["content"]] for turns in conversations]
        texts = ["".join(part.get("text", processor.image_token) for part in own) for own in parts]
        images = [[part["image"] for part in own if part["type"] == "image"] for own in parts]
        inputs = processor(text=texts, images=images, return_tensors="pt", **options)
        inputs.pop("labels", None)  # PaliGemma's processor makes them of every prompt
        return inputs
    with decoding_with_pyav(processor):
        return processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=options,
        )


class InputCache:
    """Inputs of the batches that every cell runs over: a file is decoded and resized once, not once a cell.

    What it holds is the processor's output: 1.8 MB for a clip of 12 frames of 112 x 112 pixels, 0.3 MB for an image of
    168 x 168. Batches that no longer fit are made anew every time.

    Args:
        make: the inputs of a batch of examples.
        limit: bytes to hold at most.
    """

    def __init__(self, make: Callable[[range], Any], limit: int = CACHE_BYTES):
        self._make = make
        self._left = limit
        self._held: dict[range, dict[str, Any]] = {}

    def __call__(self, batch: range) -> Any:
        """BatchFeature of its own, of tensors that must not be written to."""
        if batch in self._held:
            return BatchFeature(self._held[batch])
        inputs = self._make(batch)
        size = sum(value.nbytes for value in inputs.values() if isinstance(value, torch.Tensor))
        if size <= self._left:
            self._left -= size
            self._held[batch] = dict(inputs)
        return inputs


def processed_view(processor: Any, image: Image.Image) -> Image.Image:
    """What the encoder sees of `image`, at the encoder's resolution: resized and cropped as the processor does."""
    pixels = processor.image_processor(
        images=[image.convert("RGB")], do_rescale=False, do_normalize=False, return_tensors="pt"
    )["pixel_values"][0]
    return Image.fromarray(pixels.permute(1, 2, 0).clamp(0, 255).byte().numpy())
