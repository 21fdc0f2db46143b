# SPDX-License-Identifier: Apache-2.0
"""Checks of recorded reference vectors: one handler a family of cases, found by the file's name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from vtprune.attention import Places, RowContext
from vtprune.methods.base import Scorer
from vtprune.signals import EncoderSignal
from vtprune.tokens import ModelShape, VisualTokens

HANDLERS: dict[str, Callable[[Vector], None]] = {}
"""Pattern of case names -> the function that checks such a case."""


class Vector:
    """One recorded case: `vector["key"]` is a tensor, a Python number (0-d arrays) or an array of strings."""

    def __init__(self, path: Path):
        self.case = path.stem.rpartition("_s")[0]
        with np.load(path, allow_pickle=False) as archive:
            self._arrays = {key: archive[key] for key in archive.files}

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def __getitem__(self, key: str):
        array = self._arrays[key]
        if array.ndim == 0:
            return array.item()
        return array if array.dtype.kind in "US" else torch.from_numpy(array)

    def weights(self) -> dict[str, Tensor]:
        """The recorded state dict: every `w.*` or `w:*`."""
        return {key[2:]: torch.from_numpy(array) for key, array in self._arrays.items() if key.startswith(("w.", "w:"))}


def handles(*patterns: str):
    """Register a function as the check of all cases whose name matches one of the patterns."""

    def register(function):
        HANDLERS.update(dict.fromkeys(patterns, function))
        return function

    return register


def handler_for(case: str) -> Callable[[Vector], None] | None:
    matching = [handler for pattern, handler in HANDLERS.items() if fnmatchcase(case, pattern)]
    assert len(matching) <= 1, f"{case} is claimed by several handlers"
    return matching[0] if matching else None


def close(actual: Tensor, expected: Tensor, *, rtol: float = 2e-5, atol: float = 1e-7) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), rtol=rtol, atol=atol)


def same(actual: Tensor, expected: Tensor) -> None:
    assert actual.tolist() == expected.tolist()


def one_group(
    features: Tensor, budget: int, signals: dict, shape: ModelShape, layer: int | None = None
) -> VisualTokens:
    """The tokens of one image or sample, as a method gets them: features (tokens, dim); signals have a group axis."""
    return VisualTokens(
        features=features[None],
        valid=torch.ones(1, len(features), dtype=torch.bool),
        budget=torch.tensor([budget]),
        signals=signals,
        shape=shape,
        layer=layer,
    )


def one_per_group(features: Tensor, budget: int, **facts) -> VisualTokens:
    """The tokens of several images or frames, as a method before the LLM gets them: features (groups, tokens, dim)."""
    return VisualTokens(
        features=features,
        valid=torch.ones(features.shape[:2], dtype=torch.bool),
        budget=torch.full((len(features),), budget),
        **facts,
    )


def read(signal: EncoderSignal, shape: ModelShape, **record: dict[int, Tensor]) -> Tensor:
    """A signal of the vision encoder from what was recorded of it (see `EncoderRecord`), one token a patch."""
    view = SimpleNamespace(shape=shape, per_token=lambda values: values(SimpleNamespace(**record)))
    return signal.read_encoded(view)


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, (1, tokens, head_dim) each, for positions (tokens,)."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = positions[:, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)[None]
    return angles.cos(), angles.sin()


def row_context(rope: tuple[Tensor, Tensor], heads: int, head_dim: int, kv_heads: int | None = None) -> RowContext:
    """Rows of one sample without padding, in a layer of LLaMA; rope: cos and sin, (1, tokens, head_dim) each."""
    config = LlamaConfig(
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        head_dim=head_dim,
    )
    columns = torch.arange(rope[0].shape[1])[None]
    return RowContext(
        attention=LlamaAttention(config, layer_idx=0),
        places=Places(columns, rope),
        real=torch.ones_like(columns, dtype=torch.bool),
        past_keys=None,
        past_real=None,
    )


def kept(method, tokens: VisualTokens) -> Tensor:
    """Ascending indices of the tokens that a method keeps of a single group."""
    return method.select(tokens).keep[0].nonzero()[:, 0]


def recording(method: type[Scorer]) -> tuple[type[Scorer], list[Tensor]]:
    """A variant of a scoring method, and a list that gets the scores of its first group at every selection."""
    recorded = []

    class Recording(method):
        def scores(self, tokens: VisualTokens) -> Tensor:
            scores = super().scores(tokens)
            recorded.append(scores[0])
            return scores

    return Recording, recorded


for module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(module.name)  # handlers register themselves
