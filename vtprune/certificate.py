# SPDX-License-Identifier: Apache-2.0
"""Whether attention inside a language model is recomputed rightly: asked of the model itself, before its first use.

Recomputed rows of one layer are compared with the layer's own eager attention, on a few random tokens. Language models
on which the tests have made sure of it are not asked again.
"""

from __future__ import annotations

import weakref
from itertools import chain

import torch
from torch import nn

from vtprune.adapters.base import Adapter
from vtprune.attention import Places, RowContext, decoder_attention_rows
from vtprune.errors import UncheckedError, UnsupportedStageError
from vtprune.stages.layout import last_axis
from vtprune.transformers_private import (
    attention_input,
    eager_weights,
    is_own,
    is_tested_release,
    project_keys,
    project_queries,
    projections,
)

TESTED_TEXT_MODELS = frozenset(
    {
        "apertus",
        "arcee",
        "aria_text",
        "bitnet",
        "cohere",
        "cohere2",
        "cosmos3_edge_text",
        "deepseek_v3",
        "deepseek_ocr2_text",
        "cohere_compass_text",
        "diffllama",
        "ernie4_5",
        "ernie4_5_vl_moe_text",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma3n_text",
        "gemma4_text",
        "gemma4_unified_text",
        "glm",
        "glm4",
        "glm4v_moe_text",
        "glm4v_text",
        "glm_ocr_text",
        "gpt_oss",
        "granite",
        "granite4_vision_text",
        "granite_docling_text",
        "helium",
        "hunyuan_v1_dense",
        "hunyuan_vl_text",
        "hyperclovax",
        "llama",
        "llama4_text",
        "ministral3",
        "mistral",
        "mistral4",
        "mixtral",
        "molmo2_text",
        "muse_glimmer_text",
        "muse_spark_text",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "paddleocr_vl_text",
        "phi",
        "qwen2",
        "qwen2_5_omni_text",
        "qwen2_5_vl_text",
        "qwen2_vl_text",
        "qwen3",
        "qwen3_moe",
        "qwen3_omni_moe_text",
        "qwen3_vl_moe_text",
        "qwen3_vl_text",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
        "step3p5",
    }
)
"""Model types of language models whose attention rows the tests compare with eager attention, in every layer."""

TOKENS = 6
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest difference of an attention weight, as a share of the largest weight."""
HALF_PRECISION = 0.1
"""The same for shorter floats, whose eager weights are rounded."""

_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, bool], str | None]] = weakref.WeakKeyDictionary()
"""Decoder -> (layer, whether its input was checked, too) -> what was found wrong."""


def check_attention(adapter: Adapter, layer: int, *, of_input: bool) -> None:
    """Raise UnsupportedStageError unless attention rows of a decoder layer can be recomputed.

    of_input: also from what enters the layer, before it runs, and not only from projections seen while it runs.

    Raises UncheckedError if that has to be tried and the model was built on paper, without weights.
    """
    module = adapter.decoder_layers[layer]
    attention = getattr(module, "self_attn", None)
    missing = [] if projections(attention) else [n for n in ("q_proj", "k_proj") if getattr(attention, n, None) is None]
    if of_input and not hasattr(module, "input_layernorm"):
        missing.append("input_layernorm")
    if missing:
        _refuse(module, f"no {', '.join(missing)}")
    decoder = adapter.language_model
    tested = decoder.config.model_type in TESTED_TEXT_MODELS and is_tested_release()
    # Code that comes with a checkpoint may call itself what it likes.
    if tested and is_own(decoder) and is_own(module) and is_own(attention):
        return
    if _is_on_paper(decoder):
        raise UncheckedError(
            f"whether attention can be recomputed for a {type(module).__name__}, which the tests do not know, is tried "
            "when the weights are there"
        )
    known = _KNOWN.setdefault(decoder, {})
    if (layer, of_input) not in known:
        known[layer, of_input] = _fault(adapter, layer, of_input)
    if (fault := known[layer, of_input]) is not None:
        _refuse(module, fault)


def _refuse(module: nn.Module, reason: str) -> None:
    raise UnsupportedStageError(
        f"this method needs attention inside the LLM, which cannot be recomputed for a {type(module).__name__} "
        f"({reason}); methods before the LLM work: mmtok, divprune"
    )


@torch.no_grad()
def _fault(adapter: Adapter, layer: int, of_input: bool) -> str | None:
    """What is wrong with the recomputed rows of a decoder layer; None if nothing is."""
    try:
        error, tolerance = _row_error(adapter, layer, of_input)
    except Exception as error:  # whatever a layer that works otherwise runs into
        return f"checking it failed: {type(error).__name__}: {error}"
    if not error <= tolerance:
        return f"recomputed weights are off by {error:.2g} of the largest one"
    return None


def _is_on_paper(decoder: nn.Module) -> bool:
    """Whether a decoder has no weights. Those that accelerate has put elsewhere are brought by its hooks."""
    offloaded = any(hasattr(module, "_hf_hook") for module in decoder.modules())
    return not offloaded and all(parameter.is_meta for parameter in decoder.parameters())


def _device(decoder: nn.Module) -> torch.device:
    """Where a decoder computes; its weights may be elsewhere until they are needed."""
    devices = (tensor.device for tensor in chain(decoder.parameters(), decoder.buffers()))
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def _row_error(adapter: Adapter, layer: int, of_input: bool) -> tuple[float, float]:
    module, decoder = adapter.decoder_layers[layer], adapter.language_model
    attention, generator = module.self_attn, torch.Generator().manual_seed(0)
    states = torch.randn(1, TOKENS, adapter.states_width, generator=generator)
    states = states.to(_device(decoder), adapter.model.dtype)
    # Positions that start late and leave gaps, as they do in a pruned prompt.
    positions = torch.tensor([[3, 4, 6, 7, 11, 12]], device=states.device)
    positions = positions.expand(adapter.position_axes, 1, -1) if adapter.position_axes > 1 else positions
    places = Places(last_axis(positions), adapter.rope(layer, states, positions))
    entering = adapter.attention_input(module, states) if of_input else states[..., : decoder.config.hidden_size]
    if of_input:
        given = attention_input(module, adapter.layer_input(states), places.rope, places.ids)
        if not torch.allclose(given.float(), entering.float(), atol=1e-2, rtol=1e-2):
            return float("inf"), 0.0
    rows = torch.arange(TOKENS, device=states.device)[None]
    context = RowContext(
        attention=attention,
        places=places,
        real=torch.ones_like(rows, dtype=torch.bool),
        past_keys=None,
        past_real=None,
    )
    # Weights that are nearly equal say nothing about how they came about.
    for gain in (1.0, 4.0, 16.0):
        hidden = entering * gain
        queries, keys = project_queries(attention, hidden), project_keys(attention, hidden)
        got = decoder_attention_rows(queries, keys, rows, context)
        if got[:, :, -1].std(-1).mean() > 0.05:
            break
    expected = eager_weights(attention, hidden, places.rope, places.ids).float()
    error = (got - expected).abs().max() / expected.max()
    return float(error), TOLERANCES.get(states.dtype, HALF_PRECISION)
