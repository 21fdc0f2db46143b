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


def embed(model, ids: Tensor) -> Tensor:
    """(tokens, dim): embeddings of ids (tokens,)."""
    embedded = model.get_input_embeddings()(ids)
    for name in ("embed_vision", "embed_audio"):
        table = getattr(model.base_model, name, None)
        if hasattr(table, "vocab_offset"):  # Gemma 3n has tables of its own for these ids
            own = (ids >= table.vocab_offset) & (ids < table.vocab_offset + table.vocab_size)
            embedded[own] = table(input_ids=ids[own])
    return embedded


def open_streams(decoder, hidden: Tensor) -> Tensor:
    """What each token has in the layers of a decoder, from what enters the first one as (tokens, dim): the same, or
    (tokens, streams * dim) in Qwen4, or (tokens, streams, dim) in Hunyuan 4, GLM-5 Next and Gemma 3n."""
    if hasattr(decoder, "hc_head"):
        return hidden[:, None].repeat(1, decoder.config.hc_mult, 1)
    if hasattr(decoder, "altup_projections"):  # Gemma 3n
        return _as_large(hidden, [hidden, *(projection(hidden) for projection in decoder.altup_projections)])
    return hidden.repeat(1, getattr(decoder.config, "hc_count", 1))  # Qwen4


def _as_large(first: Tensor, streams: list[Tensor]) -> Tensor:
    """(tokens, streams, dim): streams (tokens, dim) with the root mean square of another one."""
    return torch.stack([stream * (_size(first) / _size(stream)) for stream in streams], 1)


def _size(hidden: Tensor) -> Tensor:
    return hidden.norm(dim=-1, keepdim=True)


def run_layer(decoder, index: int, hidden: Tensor, **arguments) -> Any:
    """What a decoder layer makes of `open_streams` of one sample."""
    if not hasattr(decoder, "altup_projections"):
        return decoder.layers[index](hidden[None], **arguments)
    return decoder.layers[index](hidden.movedim(1, 0)[:, None], **arguments).movedim(0, 2)


def close_streams(decoder, hidden: Tensor) -> Tensor:
    """(tokens, dim): what the output of the last layer becomes before the head."""
    if hasattr(decoder, "hc_head"):
        hidden = decoder.hc_head(hidden[None])[0]
    if hasattr(decoder, "altup_unembed_projections"):
        first, *others = hidden.unbind(1)
        pairs = zip(decoder.altup_unembed_projections, others, strict=True)
        hidden = _as_large(first, [first, *(projection(other) for projection, other in pairs)]).mean(1)
    names = ("norm", "embedding_norm", "norm_f", "final_layernorm", "hyper_connection_mixer")
    return next(getattr(decoder, name) for name in names if hasattr(decoder, name))(hidden)


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
