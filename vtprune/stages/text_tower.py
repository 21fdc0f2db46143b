# SPDX-License-Identifier: Apache-2.0
"""The text tower of a CLIP, from transformers or open_clip, for models whose vision encoder is that CLIP's."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vtprune.errors import ConfigError

OPEN_CLIP = "open_clip:"


@dataclass(frozen=True)
class TextTower:
    """What a CLIP knows of text. Its vision tower is not kept: the model has it."""

    encode: Callable[[list[str]], Tensor]
    """Texts -> (texts, dim) in the space that both towers share. What is longer than the tower's context is cut off."""
    projection: Tensor
    """(dim, width): takes features of the vision encoder there."""


_LOADED: weakref.WeakKeyDictionary[nn.Module, dict[tuple, TextTower]] = weakref.WeakKeyDictionary()
"""Model -> its text towers, which go when it goes."""


def text_tower(model: nn.Module, source: str, device: torch.device, dtype: torch.dtype) -> TextTower:
    """The tower that `source` names (see `vtprune.signals.JointSpace`), loaded once a model.

    Raises ConfigError if it cannot be loaded whole.
    """
    towers, key = _LOADED.setdefault(model, {}), (source, device, dtype)
    if key not in towers:
        load = _from_open_clip if source.startswith(OPEN_CLIP) else _from_transformers
        towers[key] = load(source, device, dtype)
    return towers[key]


def _from_transformers(source: str, device: torch.device, dtype: torch.dtype) -> TextTower:
    from transformers import AutoTokenizer, CLIPModel  # slow to import, rarely needed

    try:
        with torch.random.fork_rng(devices=[]):
            clip, loading = CLIPModel.from_pretrained(source, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise ConfigError(f"text_tower: no CLIP and tokenizer could be loaded from {source!r} ({error})") from error
    # transformers draws at random what a checkpoint lacks.
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith("vision_model."))
    if missing:
        raise ConfigError(f"text_tower: {source!r} is no whole CLIP, it lacks {len(missing)} weights like {missing[0]}")
    del clip.vision_model
    clip.eval().requires_grad_(False).to(device)
    length = clip.config.text_config.max_position_embeddings

    def encode(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        return clip.get_text_features(**tokens).pooler_output

    return TextTower(encode, clip.visual_projection.weight)


def _from_open_clip(source: str, device: torch.device, dtype: torch.dtype) -> TextTower:
    name, _, weights = source.removeprefix(OPEN_CLIP).partition("@")
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError(f'text_tower: {source!r} needs open_clip: pip install "vtprune[clip]"') from error
    try:
        with torch.random.fork_rng(devices=[]):
            clip = open_clip.create_model(name, pretrained=weights or None, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:
        raise ConfigError(
            f"text_tower: open_clip could not load {source!r} ({error}); expected open_clip:NAME@WEIGHTS, the weights "
            "a file or a tag that it knows"
        ) from error
    projection = getattr(clip.visual, "proj", None)
    if not torch.is_tensor(projection):
        raise ConfigError(f"text_tower: the vision tower of {name!r} has no projection from CLIP's features")
    projection = projection.detach().T.contiguous().to(device, dtype)
    del clip.visual
    clip.eval().requires_grad_(False).to(device, dtype)

    def encode(texts: list[str]) -> Tensor:
        return clip.encode_text(tokenizer(texts).to(device))

    return TextTower(encode, projection)
