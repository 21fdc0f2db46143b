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
from vtprune.eval.tasks import Conversation, Kind, user_turn

CACHE_BYTES = 1 << 30


def chat_inputs(
    processor: Any,
    media: Sequence[Image.Image] | Sequence[str | Path],
    questions: Sequence[str],
    kind: Kind = "image",
    **processor_kwargs: Any,
) -> Any:
    """Prompts of one user turn each: an image or a video, then the question, then the generation prompt.

    Args:
        processor: a processor with a chat template.
        media: RGB images or paths of video files, one for each prompt. The processor samples the frames of a video.
        questions: one text for each prompt.
        kind: of the media.
        processor_kwargs: passed on, e.g. `do_resize=False`.

    Returns:
        BatchFeature of tensors: `input_ids` and `attention_mask` (batch, tokens), padded on the left because generation
        continues on the right; `pixel_values` (batch, channels, height, width), or `pixel_values_videos` (batch,
        frames, channels, height, width); both as the processor lays them out, LLaVA's layout given here.
    """
    asked = zip(media, questions, strict=True)
    conversations = [[user_turn([medium], question, kind)] for medium, question in asked]
    return conversation_inputs(processor, conversations, **processor_kwargs)


def conversation_inputs(processor: Any, conversations: Sequence[Conversation], **processor_kwargs: Any) -> Any:
    """Whole conversations as inputs, followed by the generation prompt.

    Args:
        processor: a processor. Without a chat template (PaliGemma), a prompt is the markers of its images and its text.
        conversations: turns with a `role` and a `content`: parts of `type` image, video or text.
        processor_kwargs: passed on, e.g. `num_frames=32`.

    Returns:
        The same as `chat_inputs`, for any number of media in a prompt.
    """
    options = {"padding": True, "padding_side": "left", **processor_kwargs}
    if processor.chat_template is None:
        parts = [[part for turn in turns for part in turn["content"]] for turns in conversations]
        texts = ["".join(part.get("text", processor.image_token) for part in prompt) for prompt in parts]
        images = [[part["image"] for part in prompt if part["type"] == "image"] for prompt in parts]
        inputs = processor(text=texts, images=images, return_tensors="pt", **options)
        inputs.pop("labels", None)  # PaliGemma's processor makes labels of every prompt
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
    """Stores the inputs of the batches, so that a file is decoded and resized once instead of once a cell.

    The inputs are the processor's output: 1.8 MB for a clip of 12 frames of 112 x 112 pixels, 0.3 MB for an image of
    168 x 168. A batch that does not fit any more is made again every time.

    Args:
        make: makes the inputs of a batch of examples.
        limit: largest number of bytes to store.
    """

    def __init__(self, make: Callable[[range], Any], limit: int = CACHE_BYTES):
        self._make = make
        self._free = limit
        self._stored: dict[range, dict[str, Any]] = {}

    def __call__(self, batch: range) -> Any:
        """A new BatchFeature of the batch. Its tensors are shared and must not be written to."""
        if batch in self._stored:
            return BatchFeature(self._stored[batch])
        inputs = self._make(batch)
        size = sum(value.nbytes for value in inputs.values() if isinstance(value, torch.Tensor))
        if size <= self._free:
            self._free -= size
            self._stored[batch] = dict(inputs)
        return inputs


def processed_view(processor: Any, image: Image.Image) -> Image.Image:
    """The image as the encoder sees it: resized and cropped by the processor, at the encoder's resolution."""
    pixels = processor.image_processor(
        images=[image.convert("RGB")], do_rescale=False, do_normalize=False, return_tensors="pt"
    )["pixel_values"][0]
    return Image.fromarray(pixels.permute(1, 2, 0).clamp(0, 255).byte().numpy())
