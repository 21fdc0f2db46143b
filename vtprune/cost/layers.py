# SPDX-License-Identifier: Apache-2.0
"""What the cost of each decoder layer depends on, read from a config."""

from __future__ import annotations

import copy
import math
import weakref
from dataclasses import dataclass
from typing import Any

from vtprune.cost.mixers.attention import Attention
from vtprune.cost.mixers.block_index import BlockIndex
from vtprune.cost.mixers.delta_rule import DeltaRule
from vtprune.cost.mixers.latent_attention import Facts, LatentAttention, facts_by_layer
from vtprune.cost.mixers.mamba2 import Mamba2
from vtprune.cost.mixers.nothing import Nothing
from vtprune.cost.mixers.short_conv import ShortConv
from vtprune.transformers_private import key_sources, layer_config, layer_kinds

_GATED = frozenset({"muse_glimmer_text", "muse_spark_text"})
"""Model types whose attention has a gate, beside those with the delta rule."""
_UNGATED = frozenset({"persimmon", "cosmos3_edge_text"})
"""Model types whose MLPs have no gate."""


@dataclass(frozen=True)
class LayerShape:
    """A decoder layer: what mixes its tokens, and its MLP."""

    d: int
    """width of the hidden state"""
    mixer: Attention | BlockIndex | DeltaRule | LatentAttention | Mamba2 | Nothing | ShortConv
    m: int
    """width inside the MLP; of a mixture of experts, inside all experts that run for a token"""
    gates: int
    """numbers that are computed for each token to choose its experts and to weigh them; 0 without experts"""
    matrices: int = 3
    """of the MLP: gate, up and down, or two of these"""
    others: int = 0
    """elements of all other matrices that each token is multiplied with"""
    narrow: int = 0
    """width that a hidden state is projected to for the experts; 0 if they take it as it is"""
    visual_m: int | None = None
    """`m` of visual tokens, where these have experts of their own; None: that of all"""

    def flops(self, visual: float, text: float) -> float:
        """FLOPs of the layer for visual tokens and all others."""
        n = visual + text
        inside = n * self.m if self.visual_m is None else visual * self.visual_m + text * self.m
        mlp = self.matrices * (2 * (self.narrow or self.d) * inside) + 2 * n * self.d * self.gates
        return self.mixer.flops(self.d, n) + mlp + 2 * n * self.others


_READ: dict[int, tuple[weakref.ref, dict[str, Any], list[LayerShape]]] = {}
"""id of a config -> the config, what it said, and the shapes of its layers."""


def layer_shapes(config: Any, layers: int) -> list[LayerShape]:
    """The shape of each decoder layer. Layers of one kind share one object, because configs are slow to read: they are
    read again once they say something else."""
    known = _READ.get(id(config))
    if known is not None and known[0]() is config and len(known[2]) == layers and known[1] == vars(config):
        return known[2]
    number, shapes = id(config), _shapes(config, layers)
    gone = weakref.ref(config, lambda reference: _READ.pop(number, None))
    _READ[number] = gone, copy.deepcopy(vars(config)), shapes
    return shapes


def _shapes(config: Any, layers: int) -> list[LayerShape]:
    if config.model_type == "nemotron_h":
        return _lone_parts(config, layers)
    # Models that alternate attention with the delta rule gate both.
    has_delta = hasattr(config, "linear_key_head_dim")
    is_latent = getattr(layer_config(config, 0), "kv_lora_rank", None) is not None
    mixers: dict[str, BlockIndex | DeltaRule | ShortConv] = {}
    if has_delta or hasattr(config, "linear_head_dim"):
        mixers["linear_attention"] = DeltaRule.of(config)
    if hasattr(config, "conv_L_cache"):
        mixers["conv"] = ShortConv.of(config)
    if hasattr(config, "indexer_compress_ratio"):
        mixers["indexed_attention"] = BlockIndex.of(config)
    mixed = _expert_widths(config)
    matrices = 2 if config.model_type in _UNGATED else 3

    def attention(layer: int, kind: str, shares: bool, facts: Facts | None) -> LatentAttention | Attention:
        own = layer_config(config, layer)
        if facts is not None:
            return LatentAttention.of(own, facts, shares=shares)
        values_are_keys = kind == "full_attention" and getattr(config, "attention_k_eq_v", False)
        return Attention.of(
            own, gated=has_delta or config.model_type in _GATED, projected=0 if shares else 2 - values_are_keys
        )

    def shape(
        layer: int, kind: str, experts: bool, shares: bool, dense: int, others: int, facts: Facts | None
    ) -> LayerShape:
        m, gates, visual_m = mixed if mixed is not None and experts else (0, 0, None)
        if not gates or getattr(config, "enable_moe_block", False):  # Gemma 4 has experts beside a plain MLP
            m += dense
        mixer = mixers.get(kind) or attention(layer, kind, shares, facts)
        d, narrow = config.hidden_size, getattr(config, "moe_hidden_size", 0) if gates else 0
        more = others + 2 * d * narrow  # to the experts' width, and back
        return LayerShape(d, mixer, m, gates, matrices, more, narrow, visual_m)

    kinds = layer_kinds(config, layers)
    experts = [False] * layers if mixed is None else _has_experts(config, layers)
    shares = [source != layer for layer, source in enumerate(key_sources(config, layers))]
    facts = facts_by_layer(config, kinds) if is_latent else [None] * layers
    others = [_other_weights(config, layer) for layer in range(layers)]
    keys = list(zip(kinds, experts, shares, _dense_widths(config, shares), others, facts, strict=True))
    made: dict[tuple, LayerShape] = {}
    for layer, key in enumerate(keys):
        if key not in made:
            made[key] = shape(layer, *key)
    return [made[key] for key in keys]


def _lone_parts(config: Any, layers: int) -> list[LayerShape]:
    """The shape of each layer of Nemotron-H, which has one part: Mamba2, attention, an MLP or experts."""
    d, latent = config.hidden_size, config.moe_latent_size
    experts = config.num_experts_per_tok * config.moe_intermediate_size
    always = config.moe_shared_expert_intermediate_size
    # Experts of a latent width have a matrix into it, and one out of it.
    moe = dict(m=always, others=2 * latent * (d + experts)) if latent else dict(m=always + experts)
    shapes = {
        "linear_attention": LayerShape(d, Mamba2.of(config), m=0, gates=0),
        "full_attention": LayerShape(d, Attention.of(config, gated=False), m=0, gates=0),
        "mlp": LayerShape(d, Nothing(), m=config.intermediate_size, gates=0, matrices=2),
        "moe": LayerShape(d, Nothing(), gates=config.n_routed_experts, matrices=2, **moe),
    }
    return [shapes[kind] for kind in layer_kinds(config, layers)]


def _other_weights(config: Any, layer: int) -> int:
    """`others` of a layer: embeddings that Gemma 3n and Gemma 4 add, streams and the residual of low rank of Gemma 3n,
    streams and embeddings of runs of tokens of Qwen4, streams of Hunyuan 4 and GLM-5 Next."""
    d = config.hidden_size
    total = 2 * d * (getattr(config, "hidden_size_per_layer_input", 0) or 0)  # in and out
    if streams := getattr(config, "altup_num_inputs", 0):
        total += 2 * d * config.laurel_rank
        # Chosen before and after the layer: weights of the streams, and what they make of them.
        total += 2 * d * streams + streams**3 + streams**2 + d * streams**2
    if hasattr(config, "hc_lowrank"):
        streams = config.hc_count * d
        total += 2 * (2 * streams * config.hc_lowrank + streams * config.hc_count)  # before attention, before the MLP
        if layer + 1 in config.ple_layer_ids:
            total += config.ple_embed_dim * (streams + d) + streams * config.ple_conv_kernel_size
    streams = getattr(config, "hc_mult", None) or 0
    # Before attention and before the MLP: the streams' weights, and their mixture.
    return total + 2 * (streams + 3 if config.model_type == "glm5_next_text" else 2) * d * streams**2


def _dense_widths(config: Any, shares: list[bool]) -> list[int]:
    """`m` of each layer, as far as it has no experts. shares: whether it reads the keys of an earlier one."""
    width = _dense_width(config)
    widths = list(width) if isinstance(width, (list, tuple)) else [width] * len(shares)
    doubled = getattr(config, "use_double_wide_mlp", False)
    return [width * 2 if doubled and shared else width for width, shared in zip(widths, shares, strict=True)]


def _dense_width(config: Any) -> int | list[int]:
    """`m` of a layer without experts, or one a layer."""
    names = ("dense_intermediate_size", "intermediate_size_mlp", "intermediate_size")
    width = next((width for name in names if (width := getattr(config, name, None))), 0)  # 0: all have experts
    if getattr(config, "block_auto_adjust_ff_dim", False):  # LFM2
        width = int(2 * width / 3)
        if config.block_ffn_dim_multiplier is not None:
            step = config.block_multiple_of
            width = math.ceil(int(config.block_ffn_dim_multiplier * width) / step) * step
    return width


def _expert_widths(config: Any) -> tuple[int, int, int | None] | None:
    """`m`, `gates` and `visual_m` of a layer with a mixture of experts; None if the model has none."""
    experts = _first(config, "num_local_experts", "num_experts", "moe_num_experts")
    if not experts or not getattr(config, "enable_moe_block", True):
        return None
    width = _first(config, "moe_intermediate_size", "intermediate_size")
    width, of_visual = width if isinstance(width, list) else (width, None)  # Ernie 4.5 VL; shared ones are as of text
    # One of Llama 4's is shared, which its config does not say.
    llama4 = 1 if config.model_type == "llama4_text" else 0
    shared_experts = llama4 or _first(config, "n_shared_experts", "moe_num_shared_experts") or 0
    weighed = getattr(config, "shared_expert_intermediate_size", 0)
    always = _first(config, "shared_experts_intermediate_size") or width
    shared = weighed + always * shared_experts + (getattr(config, "share_expert_dim", None) or 0)
    chosen = _first(config, "num_experts_per_tok", "moe_topk", "top_k_experts")
    visual_m = None if of_visual is None else chosen * of_visual + shared
    return chosen * width + shared, experts + bool(weighed), visual_m


def _first(config: Any, *names: str) -> int | None:
    """The first of several fields that a config has and fills."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _has_experts(config: Any, layers: int) -> list[bool]:
    """Whether each decoder layer of a model with experts has them."""
    if types := getattr(config, "mlp_layer_types", None):
        return [types[layer] == "sparse" for layer in range(layers)]
    if (named := getattr(config, "moe_layers", None)) is not None:
        return [layer in named for layer in range(layers)]
    dense, every = getattr(config, "mlp_only_layers", None) or (), getattr(config, "decoder_sparse_step", 1)
    first = getattr(config, "first_k_dense_replace", None) or 0
    return [layer >= first and layer not in dense and (layer + 1) % every == 0 for layer in range(layers)]
