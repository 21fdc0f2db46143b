# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings of a layer, and axes of positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vtprune.errors import UnsupportedModelError
from vtprune.transformers_private.capture import parameters
from vtprune.transformers_private.layers import layer_type


def rotary_embedding(decoder: nn.Module, rotation: tuple[str, bool], hidden: Tensor, positions: Tensor) -> Any:
    """What a decoder hands one of its layers as `position_embeddings` at positions ([axes,] batch, n).

    rotation: the layer's `rotation_kind`. hidden: gives the device and dtype. Usually cos and sin, (batch, n, rotary
    dim) each. Some models rotate each kind of layer in its own way; None for a layer that rotates nothing (NoPE).
    """
    embedding = getattr(decoder, "rotary_emb", None)
    if embedding is None:
        raise UnsupportedModelError(
            f"a {type(decoder).__name__} has no rotary position embedding, so it cannot be pruned"
        )
    kind, rotates = rotation
    if not rotates:
        return None
    return (
        embedding(hidden, positions, kind)
        if "layer_type" in parameters(type(embedding))
        else embedding(hidden, positions)
    )


def rotation_kind(config: Any, layer: int) -> tuple[str, bool]:
    """What a decoder layer's rotation depends on beside positions: its kind, and whether there is any rotation."""
    kind = layer_type(config, layer)
    by_kind = getattr(config, "rope_parameters", None) or {}
    thetas = getattr(config, "layer_rope_theta", None)
    return kind, by_kind.get(kind, by_kind) is not None and (thetas is None or bool(thetas[layer]))


def rotates_by_position_alone(config: Any) -> bool:
    """Whether a token's rotary embedding depends on its own position alone, and not on how long the sequence is."""
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [part.get("rope_type", "default") for part in (given, *given.values()) if isinstance(part, dict)]
    return not any("dynamic" in kind or kind == "longrope" for kind in kinds)


def uses_mrope(config: Any) -> bool:
    """Whether positions of a language model have several axes (M-RoPE)."""
    given = getattr(config, "rope_parameters", None) or {}
    return any("mrope_section" in part for part in (given, *given.values()) if isinstance(part, dict))
