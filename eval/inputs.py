# SPDX-License-Identifier: Apache-2.0
"""Models by name, and their inputs from media and questions, through the processor's own chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

from vtprune.errors import ConfigError
from vtprune.eval.tasks import Kind

CACHE_BYTES = 1 << 30

_OWN_MODELS = {"digitscenes": "MODEL_PATH", "digitscenes_video": "VIDEO_MODEL_PATH"}
"""Names of the models that come with the library, and of their folders in `vtprune.eval.digitscenes`."""


def resolve_model(model: str) -> str:
    """Folder or hub id behind a model's name; `digitscenes` and `digitscenes_video` come with the library."""
    if model in _OWN_MODELS:
        from vtprune.eval import digitscenes

        return str(getattr(digitscenes, _OWN_MODELS[model]))
    return str(Path(model).expanduser()) if model.startswith("~") else model


def load_model(model: str, dtype: str = "auto", attention: str | None = None, device: str = "cpu") -> tuple[Any, Any]:
    """The model in evaluation mode and its processor.

    Args:
        model: folder, hub id, `digitscenes` or `digitscenes_video`.
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
    with _decoding_with_pyav(processor):
        return processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left", **processor_kwargs},
        )


@contextmanager
def _decoding_with_pyav(processor: Any) -> Iterator[None]:
    """While open, the processor reads video files with PyAV.

    Processors know torchcodec alone, which wants FFmpeg's libraries on the system; PyAV brings its own. With one
    decoder everywhere a file also has the same pixels everywhere.
    """
    video_processor = getattr(processor, "video_processor", None)
    if video_processor is None:
        yield
        return

    from transformers.video_utils import load_video

    def fetch(videos: Sequence[str], sample_indices_fn: Callable[..., Any] | None = None) -> list[tuple]:
        read = [load_video(video, backend="pyav", sample_indices_fn=sample_indices_fn) for video in videos]
        return list(zip(*read, strict=True))

    video_processor.fetch_videos = fetch
    try:
        yield
    finally:
        del video_processor.fetch_videos


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
