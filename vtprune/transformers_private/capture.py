# SPDX-License-Identifier: Apache-2.0
"""Copies of attention modules that hand out what their attention function is called with."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.errors import UnsupportedStageError

CAPTURE = "vtprune_capture"
"""Name of the attention function that ends the module's forward pass with what it is called with."""
NOTE = "vtprune_note"
"""Name of the attention function that notes what it is called with, for modules that call theirs several times."""
CALLS = "vtprune_calls"
"""Attribute of a replica whose attention function is `NOTE`: the list of notes."""
_LOCK, _captures = threading.Lock(), 0
_HARMLESS = {"dropout", "is_causal", "position_ids", "scaling", "sliding_window", "softcap", "s_aux"}
"""Arguments of attention functions that are read here, or that say nothing about scores."""


@dataclass(frozen=True)
class Scored:
    """What a decoder layer computes attention scores from, positions and norms applied."""

    queries: Tensor
    """(batch, heads, n, head dim)"""
    keys: Tensor
    """(batch, kv heads, n, head dim)"""
    scale: float
    softcap: float | None
    """Bound of the scores; None for none."""
    sinks: Tensor | None
    """(heads,) logits that take part in every softmax and stand for no token; None for none."""


class Captured(Exception):
    def __init__(self, scored: Scored):
        self.scored = scored


def _capture(module, query, key, value, attention_mask, *, scaling=None, softcap=None, s_aux=None, **kwargs):
    strange = [name for name, given in kwargs.items() if name not in _HARMLESS and given is not None]
    if strange:
        raise UnsupportedStageError(f"its attention function takes {', '.join(sorted(strange))}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    raise Captured(Scored(query, key, scale, softcap, s_aux))


def _note(module, query, key, value, attention_mask, *, scaling=None, **kwargs):
    # Towers hand on arguments of the whole model that say nothing here, so only what changes scores is looked for.
    strange = [name for name in ("softcap", "s_aux", "sliding_window") if kwargs.get(name) is not None]
    if strange or kwargs.get("is_causal"):
        names = strange or ["is_causal"]
        raise UnsupportedStageError(f"the vision encoder's attention function takes {', '.join(names)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    module.__dict__[CALLS].append(EncoderScores(query, key, scale, attention_mask))
    return value.transpose(1, 2), None


_FUNCTIONS = {CAPTURE: _capture, NOTE: _note}


class Given(nn.Module):
    """Stands in for a projection whose output is known."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output

    def forward(self, hidden: Tensor) -> Tensor:
        return self.output


def replica(module: nn.Module, attention: str, **children: nn.Module) -> nn.Module:
    """A copy of a module that shares its weights, with another attention function and some other children."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {**module._modules, **children}
    twin.config = copy.copy(module.config)
    # The property would also reach the sub-configs, which are shared.
    twin.config._attn_implementation_internal = attention
    return twin


def run(attention: nn.Module, hidden: Tensor, rope: Any, positions: Tensor, mask: Tensor | None) -> Any:
    """The forward pass of a replica of an attention module."""
    # The module's own `forward` may be one that accelerate has put on the original.
    forward = type(attention).forward
    # Layers whose keys others share put them there.
    more = {"position_ids": positions, "shared_kv_states": {}}
    more = {name: value for name, value in more.items() if name in parameters(type(attention))}
    return forward(attention, hidden, position_embeddings=rope, attention_mask=mask, **more)


@functools.cache
def parameters(cls: type) -> frozenset[str]:
    return frozenset(inspect.signature(cls.forward).parameters)


@contextmanager
def capturing() -> Iterator[None]:
    """While it lasts, transformers knows `CAPTURE` and `NOTE`. Sessions in several threads share them."""
    from transformers import AttentionInterface

    global _captures
    with _LOCK:
        _captures += 1
        for name, function in _FUNCTIONS.items():
            AttentionInterface.register(name, function)
    try:
        yield
    finally:
        with _LOCK:
            _captures -= 1
            if not _captures:
                for name in _FUNCTIONS:
                    del AttentionInterface._global_mapping[name]


@dataclass(frozen=True)
class EncoderScores:
    """What one call of an encoder's attention function computes scores from, positions and norms applied."""

    queries: Tensor
    """(sequences, heads, tokens, head dim)"""
    keys: Tensor
    """(sequences, heads, tokens, head dim)"""
    scale: float
    mask: Tensor | None
    """As the attention function takes it: None, (sequences, tokens) for keys, or (sequences, 1, tokens | 1, tokens)
    bool or additive."""

    def visible(self, first: int, last: int) -> Tensor | None:
        """(sequences, 1, rows | 1, tokens) bool: what the queries `first` to `last` - 1 may attend to; None: all."""
        if self.mask is None:
            return None
        if self.mask.ndim == 2:
            return self.mask.bool()[:, None, None]
        rows = self.mask if self.mask.shape[2] == 1 else self.mask[:, :, first:last]
        return rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2

    @property
    def real(self) -> Tensor | None:
        """(sequences, tokens) bool: tokens that any query may attend to, so no padding; None: all."""
        visible = self.visible(0, self.queries.shape[2])
        return None if visible is None else visible.any(2)[:, 0]

    def last_token_first(self) -> EncoderScores:
        """The same with the last token of each sequence before all others. Of calls without a mask."""
        return EncoderScores(self.queries.roll(1, 2), self.keys.roll(1, 2), self.scale, self.mask)

    def split(self, lengths: Sequence[int]) -> list[EncoderScores]:
        """A sequence of several images, each as long as stated, as one call for each image: attention does not cross
        images."""
        parts, start = [], 0
        for length in lengths:
            image = slice(start, start + length)
            mask = self.mask
            if mask is not None:
                mask = mask[..., image] if mask.ndim == 2 or mask.shape[2] == 1 else mask[:, :, image, image]
            parts.append(EncoderScores(self.queries[:, :, image], self.keys[:, :, image], self.scale, mask))
            start += length
        return parts
