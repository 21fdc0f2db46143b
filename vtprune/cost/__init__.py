# SPDX-License-Identifier: Apache-2.0
"""What a forward pass costs, counted from the tokens that really enter each layer.

`llm_prefill_flops(..., convention="exact")` counts what runs; the other conventions reproduce the formulas behind
published tables, which differ by a factor of more than two on the same model, so that a number can be compared with
the table it stands next to. Nothing here runs a model: configs in, numbers out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vtprune.cost.layers import LayerShape, layer_shapes
from vtprune.cost.mixers.attention import Attention
from vtprune.errors import ConfigError
from vtprune.transformers_private import layer_config

Counts = Sequence[float] | torch.Tensor


def _exact(shape: LayerShape, visual: float, text: int) -> float:
    return shape.flops(visual, text)


def _visual_only(shape: LayerShape, visual: float, text: int) -> float:
    return 4 * visual * shape.d**2 + 2 * visual**2 * shape.d + 2 * visual * shape.d * shape.m


def _visual_only_gated(shape: LayerShape, visual: float, text: int) -> float:
    return 4 * visual * shape.d**2 + 2 * visual**2 * shape.d + 3 * visual * shape.d * shape.m


def _llm_viewer(shape: LayerShape, visual: float, text: int) -> float:
    assert isinstance(shape.mixer, Attention)
    n = int(visual + text)
    return 2 * n * (2 * shape.d**2 + 2 * shape.d * shape.mixer.d_kv + 3 * shape.d * shape.m) + 4 * n**2 * shape.d


CONVENTIONS: dict[str, Callable[[LayerShape, float, int], float]] = {
    "exact": _exact,
    "visual_only": _visual_only,
    "visual_only_gated": _visual_only_gated,
    "llm_viewer": _llm_viewer,
}
"""Name of a convention -> its cost of one decoder layer, from (shape, visual tokens, text tokens)."""


def llm_prefill_flops(text_config: Any, visual_tokens: Counts, text_tokens: int, convention: str = "exact") -> float:
    """FLOPs of one sample's prefill through the decoder layers.

    Embedding, norms, rotary embedding, softmax and activation functions are left out in every convention, and so is the
    LM head (`lm_head_flops`).

    Args:
        text_config: config of the language model (`LlamaConfig`, `Qwen2Config`, ...), with a gated MLP.
        visual_tokens: (layers,), visual tokens entering each decoder layer; averages, hence floats, are fine.
        text_tokens: the other tokens of the prompt, the same in every layer because text is never dropped.
        convention: with n visual tokens, N tokens in all, d the width of the hidden state, d_q and d_kv those of all
            query and all key heads together, m the width inside the MLP, a decoder layer costs

            - `"exact"` (default): 4N d (d_q + d_kv) + 4N^2 d_q + 6N d m. Two FLOPs per multiply-add, grouped-query
              attention and the three matrices of a gated MLP. Attention is counted over the full N x N square, as FLOP
              counters do, although causality makes half of it unnecessary and some kernels skip it. Of a mixture of
              experts, m is the width of all experts that run for a token, and the choice among them is added. Linear
              attention by the gated delta rule, Mamba2, short convolutions and latent attention (MLA) have a cost of
              their own, the first two in chunks of tokens. Other layers that carry a state are counted as attention.
            - `"visual_only"` (FastV, arXiv 2403.06764; HoliTom, arXiv 2505.21334): 4n d^2 + 2n^2 d + 2n d m. One FLOP
              per multiply-add, no text, no grouped-query attention, two MLP matrices.
            - `"visual_only_gated"` (TransPrune, arXiv 2507.20630): 4n d^2 + 2n^2 d + 3n d m.
            - `"llm_viewer"` (AIM, arXiv 2412.03248): 2N (2d^2 + 2d d_kv + 3d m) + 4N^2 d, N truncated to an integer.

    Returns:
        FLOPs; an int when all counts are.

    Raises:
        ConfigError: unknown convention, a number of counts that is not the number of layers, a negative count, a
            convention other than "exact" for a model with linear attention, or with experts for visual tokens alone.
    """
    if convention not in CONVENTIONS:
        raise ConfigError(f"unknown FLOPs convention {convention!r}: expected one of {', '.join(CONVENTIONS)}")
    if text_tokens < 0:
        raise ConfigError(f"text_tokens must be at least 0, got {text_tokens}")
    counts = _per_layer("visual_tokens", visual_tokens, text_config)
    shapes = layer_shapes(text_config, len(counts))
    if convention != "exact" and not all(isinstance(shape.mixer, Attention) for shape in shapes):
        raise ConfigError(
            f"the FLOPs convention {convention!r} knows plain attention only, and {text_config.model_type!r} has other "
            "layers; use 'exact'"
        )
    if convention != "exact" and any(shape.visual_m is not None for shape in shapes):
        raise ConfigError(
            f"the FLOPs convention {convention!r} knows one MLP for all tokens, and {text_config.model_type!r} has "
            "experts for visual tokens alone; use 'exact'"
        )
    layer_cost = CONVENTIONS[convention]
    # Layers of one kind with the same tokens cost the same.
    kinds = Counter(zip(map(id, shapes), counts, strict=True))
    by_id = {id(shape): shape for shape in shapes}
    return sum(times * layer_cost(by_id[kind], count, text_tokens) for (kind, count), times in kinds.items())


def lm_head_flops(text_config: Any, tokens: int = 1) -> int:
    """FLOPs of the LM head for `tokens` positions; `generate()` asks for one per sample and step."""
    return 2 * tokens * text_config.hidden_size * text_config.vocab_size


def encoder_flops(
    vision_config: Any,
    sequences: Sequence[int | Sequence[int | tuple[int, int]]],
    *,
    has_cls: bool,
    gated_mlp: bool,
    mlp_width: int | None = None,
) -> int:
    """FLOPs of a vision encoder, two per multiply-add: patch embedding and all its layers.

    All layers count, also those after `vision_feature_layer`, because transformers runs them. The attention-pooling
    head of a SigLIP encoder counts if there is one. Mergers, resamplers and projectors do not count. Attention is
    counted over whole sequences, also in the layers of Qwen2.5-VL that look at windows only.

    Args:
        vision_config: config of a ViT-shaped encoder (CLIP, SigLIP, InternVL, Pixtral, Qwen-VL).
        sequences: patches, without CLS, of each sequence that passes through the encoder: an image, a tile or a frame.
            One number, or one number a layer if the encoder merges tokens, or two where its attention and its MLP run
            on different numbers.
        has_cls: whether the encoder puts a CLS token before the patches; an adapter's `has_cls`.
        gated_mlp: whether an MLP has three matrices instead of two; an adapter's `gated_encoder_mlp`.
        mlp_width: width inside an MLP, if it is not the config's `intermediate_size`; an adapter's `encoder_mlp_width`.
    """
    d = getattr(vision_config, "embed_dim", None) or vision_config.hidden_size
    m = mlp_width or getattr(vision_config, "intermediate_size", None) or int(d * vision_config.mlp_ratio)
    layers = getattr(vision_config, "num_hidden_layers", None) or vision_config.depth  # Janus has both
    matrices = 3 if gated_mlp else 2
    patch = vision_config.patch_size
    area = patch[0] * patch[1] if isinstance(patch, (list, tuple)) else patch**2
    channels = getattr(vision_config, "num_channels", None) or getattr(vision_config, "in_channels", 3)
    frames = getattr(vision_config, "temporal_patch_size", None) or getattr(vision_config, "patch_temporal", 1)
    heads = getattr(vision_config, "num_attention_heads", None) or getattr(vision_config, "num_heads", 1)
    keys = d * (getattr(vision_config, "num_key_value_heads", None) or heads) // heads
    pixels = area * channels * frames
    mlps = [_expert_weights(vision_config, layer, d, matrices) or matrices * d * m for layer in range(layers)]
    total = 0
    for patches in sequences:
        by_layer = [patches] * layers if isinstance(patches, int) else patches
        pairs = [(count, count) if isinstance(count, int) else count for count in by_layer]
        whole = pairs[0][0]
        total += 2 * whole * pixels * d
        for (entering, leaving), weights in zip(pairs, mlps, strict=True):
            total += layer_flops(2 * d * (d + keys), d, weights, entering + has_cls, leaving + has_cls)
        if getattr(vision_config, "vision_use_head", False):
            n = whole + has_cls
            # A single learned query attends to all tokens, then passes an MLP.
            total += 4 * d**2 + 4 * n * d**2 + 4 * n * d + 4 * d * m
    return total


def _expert_weights(config: Any, layer: int, d: int, matrices: int) -> int:
    """Elements of the weights that run for a token in an encoder layer with a mixture of experts; 0 without one."""
    if (getattr(config, "mlp_layer_types", None) or {layer: "dense"})[layer] != "sparse":
        return 0
    own = layer_config(config, layer)
    return matrices * d * own.moe_intermediate_size * own.num_experts_per_tok + d * own.num_local_experts


def layer_flops(attention_weights: int, width: int, mlp_weights: int, entering: int, leaving: int) -> int:
    """FLOPs of one encoder layer for one image, two per multiply-add.

    Args:
        attention_weights: elements of all weights of its attention, 4 d^2 of most.
        width: of all heads together.
        mlp_weights: elements of all weights of its MLP.
        entering: tokens that its attention runs on.
        leaving: tokens that its MLP runs on, fewer if tokens go in between.
    """
    return 2 * entering * attention_weights + 4 * entering**2 * width + 2 * leaving * mlp_weights


def projector_flops(config: Any, tokens: float) -> float:
    """FLOPs of LLaVA's two-layer projector for `tokens` visual tokens, two per multiply-add.

    Args:
        config: the whole model's config, with `vision_config`, `text_config` and `vision_feature_layer`; features of
            several layers enter the projector concatenated.
        tokens: visual tokens that pass through it.
    """
    d = config.text_config.hidden_size
    feature_layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    return 2 * tokens * (feature_layers * config.vision_config.hidden_size * d + d * d)


def kv_bytes(text_config: Any, lengths_per_layer: Counts, dtype_bytes: int = 2) -> float:
    """Bytes of one sample's KV cache. Layers of linear attention hold a state instead, which is not counted.

    Args:
        text_config: config of the language model.
        lengths_per_layer: (layers,), tokens that each layer's cache holds, text included.
        dtype_bytes: bytes per element, 2 (default) for fp16 and bf16, 4 for fp32.

    Raises:
        ConfigError: a number of lengths that is not the number of layers, a negative length.
    """
    lengths = _per_layer("lengths_per_layer", lengths_per_layer, text_config)
    shapes = layer_shapes(text_config, len(lengths))
    return sum(n * shape.mixer.cached for n, shape in zip(lengths, shapes, strict=True)) * dtype_bytes


def _per_layer(name: str, counts: Counts, config: Any) -> list[float]:
    counts = counts.tolist() if isinstance(counts, torch.Tensor) else list(counts)
    if len(counts) != config.num_hidden_layers:
        raise ConfigError(
            f"{name} holds {len(counts)} counts, the language model has {config.num_hidden_layers} layers"
        )
    if any(count < 0 for count in counts):
        raise ConfigError(f"{name} must be at least 0 everywhere, got {counts}")
    return counts
