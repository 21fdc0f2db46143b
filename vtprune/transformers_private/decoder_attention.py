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
        queries: (batch, n, heads * head dim), output of `q_proj`; None if only the keys are of interest.
        keys: (batch, n, kv heads * head dim), output of `k_proj`; None if only the queries are.
        rope: what the language model hands its layers as `position_embeddings`, for n columns.
        positions: (batch | 1, n) position ids.
        norms: whether queries and keys are normalised, where the layer does so.

    Raises UnsupportedStageError if the layer does not work that way.
    """
    hidden = keys if queries is None else queries
    given = {"q_proj": queries, "k_proj": keys, "v_proj": None}
    children: dict[str, nn.Module] = {
        name: Given(_zeros(attention, name, hidden, rope) if output is None else output)
        for name, output in given.items()
        if name in attention._modules
    }
    if not norms:
        children |= {name: nn.Identity() for name in attention._modules if "norm" in name}
    twin = replica(attention, CAPTURE, **children)
    try:
        with capturing():
            run(twin, hidden, rope, positions, None)
    except Captured as captured:
        return captured.scored
    raise UnsupportedStageError(f"{type(attention).__name__} calls no attention function of transformers")


def output_width(attention: nn.Module, projection: str) -> int:
    """Width of the output of `q_proj`, `k_proj` or `v_proj`."""
    width = getattr(getattr(attention, projection), "out_features", None)
    if width is not None:
        return width
    # Not every quantised layer says so.
    config = attention.config
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
