# SPDX-License-Identifier: Apache-2.0
"""Attention of one decoder layer: scores by the layer's own code."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.errors import UnsupportedStageError
from vtprune.transformers_private.capture import CAPTURE, Captured, Given, Scored, capturing, parameters, replica, run


def reads_positions(layer: nn.Module) -> bool:
    """Whether a module inside a decoder layer works with position ids: some scale their queries by them."""
    # Layers themselves all take them, to hand them on.
    return any(_works_with_positions(type(module)) for module in layer.modules() if module is not layer)


@functools.cache
def _works_with_positions(cls: type) -> bool:
    """Whether the forward of a class does more with position ids than hand them to its attention function."""
    if "position_ids" not in parameters(cls):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))
    except (OSError, SyntaxError):
        return True
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "position_ids"]
    handed_on = [
        keyword.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "attention_interface"
        for keyword in call.keywords
    ]
    return any(node not in handed_on for node in names)


_TO_LATENT = ("q_a_proj", "q_a_layernorm")
"""What makes a token's latent vector that `q_b_proj` expands, in latent attention (MLA)."""


def projections(attention: nn.Module) -> tuple[str, str] | None:
    """Names of the projections whose outputs `scored` takes as queries and as keys; None if they are not known.

    Latent attention (MLA) has them in steps: the last one of the queries, the first one of the keys, which holds them
    compressed.
    """
    for queries in ("q_proj", "q_b_proj"):
        for keys in ("k_proj", "kv_a_proj_with_mqa"):
            if getattr(attention, queries, None) is not None and getattr(attention, keys, None) is not None:
                return queries, keys
    return None


def project_queries(attention: nn.Module, hidden: Tensor) -> Tensor:
    """(batch, n, dim), what enters an attention module -> queries (batch, n, heads * head dim), as `scored` takes
    them."""
    name = _names(attention)[0]
    for step in (*_TO_LATENT, name) if name == "q_b_proj" else (name,):
        hidden = getattr(attention, step)(hidden)
    return hidden


def project_keys(attention: nn.Module, hidden: Tensor) -> Tensor:
    """(batch, n, dim), what enters an attention module -> keys (batch, n, width), as `scored` takes them."""
    return getattr(attention, _names(attention)[1])(hidden)


def cached_keys(attention: nn.Module, layer: Any, count: int | None = None) -> Tensor:
    """(batch, kv heads, n, head dim): the keys that a cache layer of an attention module holds, as they are scored.

    count: of the first so many columns; None for all.
    """
    expand = getattr(attention, "expand_kv", None)  # of latent attention, which caches keys and values compressed
    keys = layer.keys[:, :, :count]
    return keys if expand is None else expand(keys, layer.values[:, :, :count])[0]


def _names(attention: nn.Module) -> tuple[str, str]:
    names = projections(attention)
    if names is None:
        raise UnsupportedStageError(f"the projections of {type(attention).__name__} are not known")
    return names


def scored(
    attention: nn.Module,
    queries: Tensor | None,
    keys: Tensor | None,
    rope: Any,
    positions: Tensor,
    *,
    norms: bool = True,
) -> Scored:
    """Put a decoder layer's queries and keys through the layer's own norms and rotation.

    The layer's own code does it, up to the call of its attention function, so that no rotation, norm or sink has to be
    known here.

    Args:
        attention: the layer's attention module.
        queries: (batch, n, heads * head dim), output of the first one of `projections`; None if only the keys are of
            interest.
        keys: (batch, n, width), output of the second one; None if only the queries are of interest.
        rope: what the language model hands its layers as `position_embeddings`, for n columns.
        positions: (batch | 1, n) position ids.
        norms: whether queries and keys are normalised, where the layer does so. Without, compressed keys become ones
            where no rotation applies.

    Raises UnsupportedStageError if the layer does not work that way.
    """
    hidden = keys if queries is None else queries
    query_name, key_name = _names(attention)
    given = {query_name: queries, key_name: keys, "v_proj": None}
    children: dict[str, nn.Module] = {
        name: Given(_zeros(attention, name, hidden, rope) if output is None else output)
        for name, output in given.items()
        if name in attention._modules
    }
    if query_name == "q_b_proj":
        children |= {name: nn.Identity() for name in _TO_LATENT}
    if "g_proj" in attention._modules:  # gates what comes behind the attention function
        children["g_proj"] = nn.Identity()
    if not norms:
        children |= {name: nn.Identity() for name in attention._modules if "norm" in name}
        if "kv_b_proj" in attention._modules:
            children["kv_b_proj"] = Given(hidden.new_ones(*hidden.shape[:2], output_width(attention, "kv_b_proj")))
    twin = replica(attention, CAPTURE, **children)
    try:
        with capturing():
            run(twin, hidden, rope, positions, None)
    except Captured as captured:
        return captured.scored
    raise UnsupportedStageError(f"{type(attention).__name__} calls no attention function of transformers")


def output_width(attention: nn.Module, projection: str) -> int:
    """Width of the output of a projection of queries, keys or values."""
    width = getattr(getattr(attention, projection), "out_features", None)
    if width is not None:
        return width
    # Not every quantised layer says so.
    config = attention.config
    if getattr(attention, "kv_lora_rank", None) is not None:
        compressed = attention.kv_lora_rank + attention.qk_rope_head_dim
        expanded = attention.num_heads * (attention.qk_nope_head_dim + attention.v_head_dim)
        queries = attention.num_heads * attention.qk_head_dim
        return {"kv_a_proj_with_mqa": compressed, "kv_b_proj": expanded}.get(projection, queries)
    return attention.head_dim * (config.num_attention_heads if projection == "q_proj" else config.num_key_value_heads)


def _zeros(attention: nn.Module, projection: str, like: Tensor, rope: Any) -> Tensor:
    """Zeros in the shape of a projection's output for as many columns as there are in `like`."""
    shape = (*like.shape[:2], output_width(attention, projection))
    if torch.is_tensor(rope) and rope.is_complex():  # such rotations need contiguous numbers
        return like.new_zeros(shape)
    return like.new_zeros(()).expand(shape)  # without memory of their own


def eager_weights(attention: nn.Module, hidden: Tensor, rope: Any, positions: Tensor) -> Tensor:
    """(batch, heads, n, n) causal attention weights of a decoder layer, by the layer's own eager code.

    hidden: (batch, n, dim), what enters the attention module. The model itself is not touched.
    """
    n = hidden.shape[1]
    mask = hidden.new_full((n, n), torch.finfo(hidden.dtype).min).triu(1)[None, None]
    twin = replica(attention, "eager")
    weights = run(twin, hidden, rope, positions, mask)[1]
    if weights is None:
        raise UnsupportedStageError(f"{type(attention).__name__} gives no attention weights")
    return weights


def attention_input(layer: nn.Module, hidden: Tensor, rope: Any, positions: Tensor) -> Tensor:
    """What a decoder layer hands its attention module for an input `hidden` (batch, n, dim); same shape."""
    caught: list[Tensor] = []

    class Catch(nn.Module):
        def forward(self, *args, **kwargs):
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise Captured(None)

    twin = copy.copy(layer)
    twin.__dict__["_modules"] = {**layer._modules, "self_attn": Catch()}
    try:
        type(layer).forward(twin, hidden, position_embeddings=rope, attention_mask=None, position_ids=positions)
    except Captured:
        return caught[0]
    raise UnsupportedStageError(f"{type(layer).__name__} does not call its attention module")
