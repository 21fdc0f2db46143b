# SPDX-License-Identifier: Apache-2.0
"""Models by name, and their inputs from media and questions, through the processor's own chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.video_utils import VideoMetadata

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
        device: where to put it; `auto` spreads its layers over the accelerators there are.

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
        spread = {"device_map": "auto"} if device == "auto" else {}
        loaded = AutoModelForImageTextToText.from_pretrained(
            path, dtype=kind, attn_implementation=attention, **spread
        ).eval()
        return loaded if spread else loaded.to(device), AutoProcessor.from_pretrained(path)
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
    with _decoding_with_pyav(processor):
        return processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=options,
        )


def answers(model: Any, processor: Any, inputs: Any, max_new_tokens: int, **sampling: Any) -> tuple[list[str], Any]:
    """What a model says to a batch; greedily unless `sampling`, arguments of `generate`, says otherwise.

    Returns:
        Texts without special tokens and outer blanks, and the new tokens (batch, at most max_new_tokens).
    """
    inputs = inputs.to(model.device, model.dtype)
    with torch.inference_mode():
        output = model.generate(
            **inputs, **{"do_sample": False, "num_beams": 1} | sampling, max_new_tokens=max_new_tokens
        )
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)], new


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

    def fetch(videos: Sequence[str], sample_indices_fn: Callable[..., Any] | None = None) -> list[tuple]:
        return list(zip(*(read_frames(video, sample_indices_fn) for video in videos), strict=True))

    video_processor.fetch_videos = fetch
    try:
        yield
    finally:
        del video_processor.fetch_videos


def read_frames(path: str | Path, sample: Callable[..., Any] | None) -> tuple[np.ndarray, VideoMetadata]:
    """Frames of a video file that `sample` chooses (default all), uint8 RGB (frames, height, width, 3).

    As transformers' own reader has it, but for three kinds of files: where the container does not say how many frames
    it holds (Matroska, WebM) they are counted; a clip shorter than the number of frames asked for gives some of them
    twice, so that clips of a batch can be stacked; and what a damaged end lacks is the last frame that can be read.
    """
    import av

    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            total = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
            rate = float(stream.average_rate or 0)
            shape = {"height": stream.height, "width": stream.width}
            metadata = VideoMetadata(
                total, fps=rate, duration=total / rate if rate else 0, video_backend="pyav", **shape
            )
            asked = getattr(sample, "keywords", {}).get("num_frames") or 0  # transformers makes `sample` a partial
            if sample is None:
                indices = list(range(total))
            elif asked > total:
                indices = [index * total // asked for index in range(asked)]
            else:
                indices = [int(index) for index in sample(metadata=metadata)]
            wanted, read = set(indices), {}
            container.seek(0)
            for index, frame in enumerate(container.decode(stream)):
                if index in wanted:
                    read[index] = frame.to_ndarray(format="rgb24")
                if len(read) == len(wanted):
                    break
    except (OSError, IndexError, av.FFmpegError) as error:
        raise ConfigError(f"{path}: cannot be read as a video: {error}") from error
    if not read:
        raise ConfigError(f"{path}: no frame of this video can be decoded")
    metadata.frames_indices = np.asarray(indices)
    last = read[max(read)]
    return np.stack([read.get(index, last) for index in indices]), metadata


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
