# SPDX-License-Identifier: Apache-2.0
"""Models by name, and their inputs from images and questions, through the processor's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vtprune.errors import ConfigError


def resolve_model(model: str) -> str:
    """Folder or hub id behind a model's name; `digitscenes` is the model that comes with the library."""
    if model == "digitscenes":
        from vtprune.eval import digitscenes

        return str(digitscenes.MODEL_PATH)
    return str(Path(model).expanduser()) if model.startswith("~") else model


def load_model(model: str, dtype: str = "auto", attention: str | None = None, device: str = "cpu") -> tuple[Any, Any]:
    """The model in evaluation mode and its processor.

    Args:
        model: folder, hub id or `digitscenes`.
        dtype: name of a torch dtype; default that of the weights.
        attention: attention back end; default transformers' choice.
        device: where to put it.

    Raises:
        ConfigError: transformers cannot load it.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    path = resolve_model(model)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would tear the caller's own
    try:
        loaded = AutoModelForImageTextToText.from_pretrained(path, dtype=kind, attn_implementation=attention)
        return loaded.to(device).eval(), AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model {path!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    finally:
        if bars:
            logging.enable_progress_bar()


def chat_inputs(
    processor: Any, images: Sequence[Image.Image], questions: Sequence[str], **processor_kwargs: Any
) -> Any:
    """One user turn an image: the image, then the question, with the generation prompt behind it.

    Args:
        processor: a processor with a chat template.
        images: RGB images, one a prompt.
        questions: as many texts.
        processor_kwargs: passed on, e.g. `do_resize=False`.

    Returns:
        BatchFeature of tensors: `input_ids` and `attention_mask` (batch, tokens), padded on the left because generation
        continues on the right; `pixel_values` (batch, channels, height, width).
    """
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in zip(images, questions, strict=True)
    ]
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left", **processor_kwargs},
    )


def processed_view(processor: Any, image: Image.Image) -> Image.Image:
    """What the encoder sees of `image`, at the encoder's resolution: resized and cropped as the processor does."""
    pixels = processor.image_processor(
        images=[image.convert("RGB")], do_rescale=False, do_normalize=False, return_tensors="pt"
    )["pixel_values"][0]
    return Image.fromarray(pixels.permute(1, 2, 0).clamp(0, 255).byte().numpy())
