# SPDX-License-Identifier: Apache-2.0
"""LLaVA with any language model below its CLIP encoder: tiny, with random weights; and what it computes with columns
taken out by hand.

`LlavaForConditionalGeneration` takes every text model that `AutoModel` knows, and people combine them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from . import models

LAYERS = 4
_SMALL: dict[str, Any] = dict(
    models.TEXT,
    num_hidden_layers=LAYERS,
    head_dim=16,
    rope_head_dim=16,
    # mixtures of experts
    num_experts=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    intermediate_size_mlp=96,
    # layers that carry a state
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    mamba_d_ssm=64,
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_d_state=16,
    mamba_n_groups=1,
    # of both kinds of layers: sequences here are shorter than any window or chunk
    sliding_window=512,
    attention_chunk_size=512,
    query_pre_attn_scalar=16,
)
"""Fields of text configs, each given to those that have it."""
_LATENT = dict(
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    kv_lora_rank=32,
    q_lora_rank=32,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_key_value_heads=4,
)
_OTHERS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "llama4_text": {"no_rope_layers": [1, 0] * 2, "moe_layers": [1, 3]},
    "smollm3": {"no_rope_layers": [1, 0] * 2},
    "ministral3": {"sliding_window": None},
    "deepseek_v3": _LATENT | {"first_k_dense_replace": 2, "q_lora_rank": None},
    "mistral4": _LATENT | {"head_dim": 32},
}

EVERYTHING = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "cohere",
    "cohere2",
    "glm",
    "glm4",
    "ernie4_5",
    "hunyuan_v1_dense",
    "stablelm",
    "starcoder2",
    "olmo",
    "granite",
    "smollm3",
    "helium",
    "nemotron",
    "seed_oss",
    "mixtral",
    "gpt_oss",
    "arcee",
    "diffllama",
    "bitnet",
    "llama4_text",
    "ministral3",
    "deepseek_v3",
    "mistral4",
    "aria_text",
]
"""Language models on which methods of all stages are right."""
SEEN_WHILE_RUNNING = ["olmo2", "olmo3", "exaone4", "apertus"]
"""Where a layer's attention is seen while it runs, but cannot be computed before (no norm before attention)."""
BEFORE = {
    "phi3": "no q_proj, k_proj",
    "gpt_neox": "no q_proj, k_proj",
    "persimmon": "no q_proj, k_proj",
    "lfm2": "state from token to token",
    "qwen3_next": "state from token to token",
    "qwen3_5_text": "state from token to token",
    "falcon_h1": "state from token to token",
}
"""Where methods before the LLM are right, and those inside are refused, with a part of the reason."""
REFUSED = {"minimax": "keeps its KV cache in a MiniMaxCache"}
"""Where nothing can be pruned, with a part of the reason."""
NAMES = [*EVERYTHING, *SEEN_WHILE_RUNNING, *BEFORE, *REFUSED]
_FIRST = {
    *("llama", "gemma3_text", "cohere", "smollm3", "hunyuan_v1_dense", "gpt_oss", "llama4_text", "ministral3"),
    *("olmo2", "phi3", "mistral4", "qwen3_next", "falcon_h1", "minimax"),
}
"""One of each kind of attention; the default run of the tests leaves the others to `.ci/run`."""


def parameters(*groups: Iterable[str]) -> list:
    """Names for `pytest.mark.parametrize`."""
    names = (name for group in groups for name in group)
    return [pytest.param(name, marks=() if name in _FIRST else pytest.mark.slow) for name in names]


def text_config(name: str):
    """A tiny text config of a model type."""
    default = AutoConfig.for_model(name)
    fields = {key: value for key, value in _SMALL.items() if hasattr(default, key)}
    return type(default)(**fields | _OTHERS.get(name, {}))


@functools.cache
def shared(name: str):
    """A model with eager attention, so that every layer's mask is at hand; whoever uses it leaves it as it was."""
    model = models.with_text_tower(text_config(name), "eager")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for key, parameter in model.get_decoder().named_parameters():
            if parameter.ndim == 1:  # sinks, and gains of norms, must make a difference
                parameter.data += 0.3 * torch.randn_like(parameter)
            elif "dt_bias" in key or "A_log" in key:
                parameter.data.uniform_(0.0, 1.0)
    return model


@torch.no_grad()
def with_columns_taken_out(model, ids: Tensor, images: Tensor, kept: list[Tensor]) -> Tensor:
    """Logits (tokens, vocabulary) of one sample without a cache; rows of dropped columns are NaN.

    ids: (tokens,), the prompt, then what was generated; kept: one LongTensor a layer, the visual columns alive in it.
    Columns keep their positions. The language model itself runs; hooks take columns out of what its layers are given.
    """
    decoder = model.get_decoder()
    hidden = model.get_input_embeddings()(ids)
    visual = (ids == models.IMAGE_TOKEN).nonzero()[:, 0]
    hidden[visual] = torch.cat(list(model.get_image_features(images, return_dict=True).pooler_output))
    alive = [torch.cat([torch.arange(len(ids))[ids != models.IMAGE_TOKEN], k]).sort().values for k in kept]

    def taken(value: Any, places: Tensor, length: int) -> Any:
        if torch.is_tensor(value):
            for dim, size in enumerate(value.shape):
                if size == length and not (value.is_floating_point() and value.ndim == 3 and dim == 2):
                    value = value.index_select(dim, places)
            return value
        return tuple(taken(part, places, length) for part in value) if isinstance(value, tuple) else value

    def before(layer: int):
        def hook(module, args, kwargs):
            inside = torch.searchsorted(alive[layer - 1], alive[layer])
            places, length = torch.searchsorted(alive[0], alive[layer]), len(alive[0])
            kwargs = {key: taken(value, places, length) for key, value in kwargs.items()}
            return (args[0].index_select(1, inside), *args[1:]), kwargs

        return hook

    cuts = [i for i in range(1, len(kept)) if len(kept[i]) < len(kept[0])]
    hooks = [decoder.layers[i].register_forward_pre_hook(before(i), with_kwargs=True) for i in cuts]
    try:
        places = alive[0][None]
        # Without a mask, gaps in the positions would be taken for packed sequences.
        every = torch.ones_like(places)
        states = decoder(
            inputs_embeds=hidden[places], position_ids=places, attention_mask=every, use_cache=False
        ).last_hidden_state
    finally:
        for handle in hooks:
            handle.remove()
    logits = torch.full((len(ids), model.config.text_config.vocab_size), float("nan"))
    logits[alive[-1]] = model.lm_head(states[0])
    return logits
