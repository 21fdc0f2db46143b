# SPDX-License-Identifier: Apache-2.0
"""Models that classify by prompts, by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.eval.inputs.models import loading, resolve_model

OPEN_CLIP = "digitscenes_clip"
"""The model of open_clip that comes with the library."""

_TYPES = ("clip", "siglip")
"""`model_type` of `CLIPModel` and `SiglipModel`."""


def is_classifier(model: str) -> bool:
    """Whether a name, a folder or a hub id is that of a model that classifies by prompts; reads its config.

    Raises ConfigError if there is no config that transformers can read. Models of open_clip have none: of these only
    `digitscenes_clip` has a name.
    """
    from transformers import AutoConfig

    if model == OPEN_CLIP:
        return True
    path = resolve_model(model)
    with loading(path):
        return AutoConfig.from_pretrained(path).model_type in _TYPES


def load_classifier(
    model: str, dtype: str = "float32", attention: str = "sdpa", device: str = "cpu"
) -> tuple[Any, Any, Callable[[Image], Tensor]]:
    """A model in evaluation mode, its tokenizer, and its preprocessing of an RGB image: float (3, height, width).

    Args:
        model: `digitscenes_clip`, or folder or hub id of a `CLIPModel` or `SiglipModel` of transformers.
        dtype: name of a torch dtype.
        attention: attention back end; models of open_clip have sdpa only.
        device: where to put it.

    Raises:
        ConfigError: it cannot be loaded, open_clip is missing, or the model has no such attention or no image
            processor.
    """
    kind = getattr(torch, dtype)
    if model == OPEN_CLIP:
        if find_spec("open_clip") is None:
            raise ConfigError(f'model {model!r} needs open_clip: pip install "vtprune[clip]"')
        if attention != "sdpa":
            raise ConfigError(f"attention: models of open_clip run with 'sdpa' only, got {attention!r}")
        from vtprune.eval.digitscenes import load_open_clip

        loaded, tokenizer, preprocess = load_open_clip()
        return loaded.to(device, kind), tokenizer, preprocess

    from transformers import AutoModel, AutoProcessor

    path = resolve_model(model)
    with loading(path):
        loaded = AutoModel.from_pretrained(path, dtype=kind, attn_implementation=attention).eval().to(device)
        processor = AutoProcessor.from_pretrained(path)
    if getattr(processor, "image_processor", None) is None:
        raise ConfigError(f"model {path!r} cannot classify: it has no image processor")
    return loaded, processor, lambda image: processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
