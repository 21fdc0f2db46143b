# SPDX-License-Identifier: Apache-2.0
"""Models by name, loaded with their processors, and what they answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vtprune.errors import ConfigError

_OWN_MODELS = {
    "digitscenes": "MODEL_PATH",
    "digitscenes_video": "VIDEO_MODEL_PATH",
    "digitscenes_clip": "OPEN_CLIP_PATH",
}
"""Name of a model that comes with the library -> name of its folder in `vtprune.eval.digitscenes`."""


def resolve_model(model: str) -> str:
    """Folder or hub id behind a model's name; `digitscenes`, `digitscenes_video` and `digitscenes_clip` come with the
    library."""
    if model in _OWN_MODELS:
        from vtprune.eval import digitscenes

        return str(getattr(digitscenes, _OWN_MODELS[model]))
    return str(Path(model).expanduser()) if model.startswith("~") else model


HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
"""What may be the name of a model on the hub; anything else is a path."""


@contextmanager
def loading(path: str) -> Iterator[None]:
    """Shows no progress bars, which would break the caller's.

    Raises ConfigError for what transformers raises if it cannot load the model at `path`.
    """
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        if not Path(path).exists() and not HUB_ID.fullmatch(path):
            raise ConfigError(f"model {path!r} cannot be loaded: there is no such folder") from error
        raise ConfigError(f"model {path!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    finally:
        if bars:
            logging.enable_progress_bar()


def check_device(device: str) -> None:
    """Raise ConfigError unless there is such a device."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {str(error).strip().splitlines()[0]}") from error


def load_model(model: str, dtype: str = "auto", attention: str | None = None, device: str = "cpu") -> tuple[Any, Any]:
    """The model in evaluation mode and its processor.

    Args:
        model: folder, hub id, `digitscenes` or `digitscenes_video`.
        dtype: name of a torch dtype; default that of the weights.
        attention: attention back end; default transformers' choice.
        device: where to put it; `auto` spreads its layers over the accelerators there are.

    Raises:
        ConfigError: transformers cannot load it, or there is no such device.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if device != "auto":
        check_device(device)
    path = resolve_model(model)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    with loading(path):
        spread = {"device_map": "auto"} if device == "auto" else {}
        loaded = AutoModelForImageTextToText.from_pretrained(
            path, dtype=kind, attn_implementation=attention, **spread
        ).eval()
        return loaded if spread else loaded.to(device), AutoProcessor.from_pretrained(path)


def empty_model(model: str, **kinds: Any) -> Any:
    """A vision-language model without weights, on the device "meta", from its config alone.

    Args:
        model: folder, hub id, or the name of one that comes with the library.
        kinds: `dtype` and `attn_implementation`; default those of the config.

    Raises:
        ConfigError: there is no such model, or it is none that answers questions.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    path = resolve_model(model)
    with loading(path), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path), **kinds)


def answers(model: Any, processor: Any, inputs: Any, max_new_tokens: int, **sampling: Any) -> tuple[list[str], Any]:
    """A model's answers to a batch; greedy unless `sampling`, arguments of `generate`, says otherwise.

    Returns:
        The texts without special tokens and outer blanks, and the new tokens (batch, at most max_new_tokens).
    """
    inputs = inputs.to(model.device, model.dtype)
    with torch.inference_mode():
        output = model.generate(
            **inputs, **{"do_sample": False, "num_beams": 1} | sampling, max_new_tokens=max_new_tokens
        )
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)], new
