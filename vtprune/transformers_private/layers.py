# SPDX-License-Identifier: Apache-2.0
"""Kinds of decoder layers, and their caches."""

from __future__ import annotations

import functools
import typing
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from vtprune.errors import UnsupportedModelError, UnsupportedStageError
from vtprune.transformers_private.arguments import cache_parameter
from vtprune.transformers_private.release import releases

_WITHOUT_KEYS = tuple(
    getattr(cache_utils, name)
    for name in ("LinearAttentionCacheLayerMixin", "DummyLayer")
    if hasattr(cache_utils, name)
)
"""Cache layers that hold no tokens: a state instead, or nothing."""

ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of decoder layers that hold nothing but keys and values, one of each a token."""

_STATE_KINDS = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding"})
"""Kinds of decoder layers with a state that each token changes; "hybrid" ones hold keys and values, too."""

_INDEXED = "indexed_attention"
"""Kind of decoder layers that attend to the keys of some columns only, which they look up in an index."""

_WHOLE_PROMPT = "reference_sliding_attention"
"""Kind of decoder layers that attend to the whole prompt and to a window of what follows it."""

_ALONE_KINDS = frozenset({"mlp", "moe"})
"""Kinds of decoder layers that look at each token alone."""


def layer_type(config: Any, layer: int) -> str:
    """Kind of a decoder layer, as transformers names it: "full_attention", "linear_attention", ..."""
    return layer_kinds(config, layer + 1)[layer]


def layer_kinds(config: Any, layers: int) -> Sequence[str]:
    """`layer_type` of the first so many decoder layers."""
    if types := getattr(config, "layer_types", None):
        return types[:layers]
    return ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"] * layers


def layer_config(config: Any, layer: int) -> Any:
    """What a decoder layer is made by: the config of all, unless fields differ by layer."""
    return config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config


def state_kinds(config: Any, layers: int) -> list[str]:
    """Kinds of decoder layers inside which no token can go, sorted: those that carry a state from token to token
    (convolutions, linear attention, Mamba), `_INDEXED` ones, which hand numbers of columns on to later layers, and
    `_WHOLE_PROMPT` ones, whose cache holds prompt and answer apart.

    Raises UnsupportedModelError if a layer is of a kind that is not known.
    """
    kinds = set(layer_kinds(config, layers)) - ATTENTION_KINDS
    if kinds & _STATE_KINDS:  # without these, nobody has tried what is in such models
        kinds -= _ALONE_KINDS
    if strange := sorted(kinds - _STATE_KINDS - {_INDEXED, _WHOLE_PROMPT}):
        raise UnsupportedModelError(
            f"the language model {config.model_type!r} has layers of a kind that is not known: {', '.join(strange)}; "
            f"{releases()}"
        )
    return sorted(kinds)


def carried(kinds: list[str]) -> str:
    """What layers of some `state_kinds` do, in words."""
    known = {_INDEXED: "look their keys up by column number", _WHOLE_PROMPT: "keep prompt and answer apart"}
    return known.get(kinds[0] if len(kinds) == 1 else "", "carry a state from token to token")


def key_sources(config: Any, layers: int) -> list[int]:
    """Of each decoder layer, the one whose keys and values it reads: itself, but for some of Mistral Large 4, and for
    the last ones of Gemma 3n and Gemma 4, which read those of the last layer of their kind before them."""
    if (sources := getattr(config, "kv_source_layers", None)) is not None:
        return list(sources)
    own = layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    kinds = layer_kinds(config, layers)
    last = {kind: layer for layer, kind in enumerate(kinds[:own])}
    return [layer if layer < own else last[kind] for layer, kind in enumerate(kinds)]


def column_counters(decoder: nn.Module) -> list[nn.Module]:
    """Modules of a language model that are handed the KV cache, and take the length that a layer of it states for the
    number of columns that it holds: the indexes of GLM5-Next."""
    if decoder.config.model_type != "glm5_next_text":
        return []
    indexes = [getattr(layer.self_attn, "indexer", None) for layer in decoder.layers]
    return [index for index in indexes if index is not None]


def longest_prunable(config: Any, layers: int) -> int | None:
    """Length of the longest sequence in which tokens can go missing; None for any.

    Layers with chunks, or with queries scaled by how many tokens came before, would see other chunks and scales in a
    sequence that has been cut.
    """
    limits = []
    if "chunked_attention" in layer_kinds(config, layers):
        limits.append(config.attention_chunk_size)
    if getattr(config, "attn_temperature_tuning", False):
        limits.append(int(config.floor_scale) - 1)
    return min(limits, default=None)


def check_decoder(decoder: nn.Module) -> None:
    """Raise UnsupportedModelError if a language model has a class of its own for its KV cache."""
    parameter = cache_parameter(decoder)
    for cls in typing.get_args(parameter and parameter.annotation):
        if isinstance(cls, type) and issubclass(cls, Cache) and cls not in (Cache, DynamicCache):
            raise UnsupportedModelError(
                f"a {type(decoder).__name__} keeps its KV cache in a {cls.__name__}, in which tokens cannot go missing"
            )


def is_paged(cache: Any) -> bool:
    """Whether a KV cache is one of pages that many requests share (continuous batching), without layers of its own."""
    return not isinstance(cache, Cache)


@functools.cache
def _replays_hooks() -> bool:
    """Whether gradient checkpointing runs a layer's hooks once more in the backward pass, as older releases do."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" in vars(GradientCheckpointingLayer)


def is_checkpointed(layer: nn.Module) -> bool:
    """Whether a decoder layer is under gradient checkpointing now, and leaves the KV cache that it is given alone."""
    on = getattr(layer, "gradient_checkpointing", False) and layer.training
    return on and (torch.is_grad_enabled() or _replays_hooks())


def check_replay(layer: nn.Module) -> None:
    """Raise UnsupportedStageError if hooks of a decoder layer would run once more when their call is over."""
    if is_checkpointed(layer) and torch.is_grad_enabled() and _replays_hooks():
        raise UnsupportedStageError(
            "this release of transformers runs the hooks of decoder layers once more under gradient checkpointing, "
            "when what was pruned between them is gone; turn it off, use a method before the LLM, or a newer "
            f"release: {releases()}"
        )


def has_keys(layer: Any) -> bool:
    """Whether a cache layer holds keys and values; those of convolutions and linear attention hold a state instead."""
    return isinstance(layer, CacheLayerMixin)


def is_prunable(layer: Any) -> bool:
    """Whether tokens can go missing in a cache layer: one that grows, or that holds no tokens at all."""
    if has_keys(layer):
        return not layer.is_compileable
    return isinstance(layer, _WITHOUT_KEYS)


def create_missing_layers(cache: Cache, count: int) -> None:
    """Create the layers of a cache that transformers would create lazily."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < count:
            cache.layers.append(cache.layer_class_to_replicate())
        cache.layer_class_to_replicate = None


def keeps_prompt(layer: Any) -> bool:
    """Whether a cache layer holds the whole prompt, whose length it may be told ahead, and a window of what follows."""
    return hasattr(layer, "set_prefill_length")


def is_plain_layer(layer: Any) -> bool:
    """Whether a cache layer keeps its keys and values as two tensors, all of them, unquantised."""
    return type(layer) is DynamicLayer


def static_columns(layer: Any) -> int | None:
    """How many columns a static cache layer has that holds nothing but keys and values; None for all other layers."""
    return layer.max_cache_len if type(layer) in (StaticLayer, StaticSlidingWindowLayer) else None


def attention_window(config: Any) -> int | None:
    """How many columns layers with a sliding window, or in chunks, see; None if there are none."""
    return getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)


def fixed_address(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, which graphs made from now on may take to stay where it is: CUDA graphs do not copy it."""
    torch._dynamo.mark_static_address(tensor)
    return tensor
