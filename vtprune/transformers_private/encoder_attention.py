# SPDX-License-Identifier: Apache-2.0
"""Attention of one encoder layer: scores by the layer's own code, whatever it packs, masks or rotates."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.errors import UnsupportedStageError
from vtprune.transformers_private.capture import CALLS, NOTE, EncoderScores, Given, capturing, replica

_PROJECTIONS = (("q_proj", "k_proj"), ("q", "k"), ("qkv",))
"""Names under which towers of transformers project to queries and keys."""
_VALUES = {"v_proj": "k_proj", "v": "k"}
"""Name of a projection to values -> that of the one to keys beside it."""


def query_key_projections(attention: nn.Module) -> tuple[str, ...]:
    """Names of the children of an encoder's attention module that project to queries and keys.

    Raises UnsupportedStageError if it has none that are known.
    """
    for names in _PROJECTIONS:
        if all(name in attention._modules for name in names):
            return names
    raise UnsupportedStageError(
        f"the attention of this vision encoder cannot be recomputed: {type(attention).__name__} has none of the "
        f"projections {', '.join(' and '.join(names) for names in _PROJECTIONS)}"
    )


_ROTATIONS = ("position_embeddings", "freqs_ci")
"""Arguments of attention modules that rotate queries and keys: cosines and sines, or complex numbers."""


def is_rotated(kwargs: Mapping[str, Any]) -> bool:
    """Whether an encoder's attention module that is called with these arguments rotates queries and keys."""
    return any(kwargs.get(name) is not None for name in _ROTATIONS)


def _unrotated(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of such a module, with rotations by nothing."""

    def nothing(rotation: Any) -> Any:
        if torch.is_tensor(rotation):
            return torch.ones_like(rotation)
        cos, sin = rotation
        return torch.ones_like(cos), torch.zeros_like(sin)

    given = {name: kwargs[name] for name in _ROTATIONS if kwargs.get(name) is not None}
    return {**kwargs, **{name: nothing(rotation) for name, rotation in given.items()}}


def encoder_scores(
    attention: nn.Module,
    projected: Mapping[str, Tensor],
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    rotated: bool = True,
) -> list[EncoderScores]:
    """Put an encoder layer's queries and keys through the layer's own norms and rotation, as `scored` does.

    One for each call of its attention function: modules that pack images, or attend within windows, make one for each
    image or window, in the order of the tokens.

    Args:
        attention: the layer's attention module.
        projected: name of a projection (see `query_key_projections`) -> its output.
        args, kwargs: what the module was called with.
        rotated: whether queries and keys are rotated, where the layer does so.
    """
    children: dict[str, nn.Module] = {name: Given(output) for name, output in projected.items()}
    for values, name in _VALUES.items():
        if values in attention._modules:  # values are as wide as keys, and nothing is read of them
            keys = projected[name]
            children[values] = Given(keys.new_zeros(()).expand(keys.shape))
    # What comes behind the attention function costs time and says nothing.
    children |= {
        name: nn.Identity()
        for name, child in attention._modules.items()
        if name not in children and isinstance(child, nn.Linear)
    }
    twin = replica(attention, NOTE, **children)
    calls = twin.__dict__[CALLS] = []
    if not rotated:
        kwargs = _unrotated(kwargs)
    with torch.no_grad(), capturing():
        type(attention).forward(twin, *args, **kwargs)
    if not calls:
        raise UnsupportedStageError(f"{type(attention).__name__} calls no attention function of transformers")
    return calls


@contextmanager
def eager_encoder_attention(attention: nn.Module) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
    """While it lasts, weights and mask of each call of the eager attention function by an encoder's attention module.

    The module has to run with the eager back end. Not for several threads at a time.
    Raises UnsupportedStageError if the module's file has no such function.
    """
    home = sys.modules[type(attention).__module__]
    # Some files have one function for each kind of module.
    functions = {name: value for name, value in vars(home).items() if name.endswith("eager_attention_forward")}
    if not functions:
        raise UnsupportedStageError(f"{home.__name__} has no eager attention function")
    calls: list[tuple[Tensor, Tensor | None]] = []

    def noting(eager):
        def note(module, query, key, value, attention_mask=None, **kwargs):
            output = eager(module, query, key, value, attention_mask, **kwargs)
            if module is attention:
                calls.append((output[1], attention_mask))
            return output

        return note

    vars(home).update({name: noting(eager) for name, eager in functions.items()})
    try:
        yield calls
    finally:
        vars(home).update(functions)
