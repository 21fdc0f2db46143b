# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings of a layer, and axes of positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vtprune.errors import UnsupportedModelError
from vtprune.transformers_private.capture import parameters
from vtprune.transformers_private.layers import layer_type


def rotary_embedding(decoder: nn.Module, layer: int, hidden: Tensor, positions: Tensor) -> Any:
    """What a decoder hands one of its layers as `position_embeddings` at positions ([axes,] batch, n).

    hidden: gives the device and dtype. Usually cos and sin, (batch, n, rotary dim) each. Some models rotate each kind
    of layer in its own way.
    """
    embedding = getattr(decoder, "rotary_emb", None)
    if embedding is None:
        raise UnsupportedModelError(
            f"a {type(decoder).__name__} has no rotary position embedding, so it cannot be pruned"
        )
    if "layer_type" in parameters(type(embedding)):
        return embedding(hidden, positions, layer_type(decoder.config, layer))
    return embedding(hidden, positions)


def uses_mrope(config: Any) -> bool:
    """Whether positions of a language model have several axes (M-RoPE)."""
    return "mrope_section" in (getattr(config, "rope_parameters", None) or {})
