# SPDX-License-Identifier: Apache-2.0
"""What decoders do around their layers, in the words of their configs: scales of embeddings and logits, rotations."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vtprune.testing.recompute import Vision


def enter(decoder, embeddings: Tensor, vision: Vision) -> Tensor:
    """What enters the first decoder layer. embeddings: (tokens, dim) of the prompt's ids."""
    hidden = embeddings.index_copy(0, *vision.indicators).index_copy(0, vision.columns, vision.features)
    hidden = hidden * getattr(decoder, "embedding_multiplier", 1)
    return hidden.index_add(0, vision.columns, vision.deepstack[0]) if 0 in vision.deepstack else hidden


def entering_scale(decoder, vision: Vision) -> float:
    """What visual features are multiplied by on their way into the first decoder layer."""
    # What is added there instead of features is not.
    return 1 if 0 in vision.deepstack else getattr(decoder, "embedding_multiplier", 1)


def rotary(decoder, layer: int, hidden: Tensor, positions: Tensor) -> dict[str, Any]:
    """The rotation that the decoder hands a layer, as an argument; None of it for a layer without rotation, and no
    argument where the layer takes none."""
    config, kind = decoder.config, layer_kind(decoder.config, layer)
    if kind == "conv" or not hasattr(decoder, "rotary_emb"):
        return {}
    thetas, by_kind = getattr(config, "layer_rope_theta", None), config.rope_parameters
    if (thetas is not None and thetas[layer] == 0) or (kind in by_kind and by_kind[kind] is None):
        return {"position_embeddings": None}
    scaled = layer in getattr(config, "rope_scaling_layers", (layer,))
    embedding = decoder.rotary_emb if scaled else decoder.rotary_emb_unscaled
    per_kind = "layer_type" in inspect.signature(embedding.forward).parameters
    return {"position_embeddings": embedding(hidden, positions, **{"layer_type": kind} if per_kind else {})}


def to_logits(model, states: Tensor) -> Tensor:
    """Logits (..., vocabulary) of normalised states (..., dim)."""
    head = model.get_output_embeddings() or model.get_decoder().get_output_embeddings()
    logits, config = head(states), model.get_decoder().config
    for multiplier in ("logit_scale", "output_multiplier"):
        if _reads(type(model), multiplier):
            logits = logits * getattr(config, multiplier)
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None and _reads(type(model), "final_logit_softcapping"):  # PaliGemma does from transformers 5.23 on
        logits = cap * torch.tanh(logits / cap)
    if not _reads(type(model), "logits_scaling"):
        return logits
    divides = config.model_type != "hyperclovax"
    return logits / config.logits_scaling if divides else logits * config.logits_scaling


def layer_kind(config, index: int) -> str:
    if getattr(config, "layer_types", None) is not None:
        return config.layer_types[index]
    return "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"


@functools.cache
def _reads(cls: type, name: str) -> bool:
    """Whether a model's forward works with a value of a config."""
    return name in inspect.getsource(cls.forward)
