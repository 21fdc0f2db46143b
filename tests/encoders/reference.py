# SPDX-License-Identifier: Apache-2.0
"""Encoders with token merging, written out: attention as a softmax, one image and one merge at a time, and every host's
pooling with explicit weights. Nothing here is shared with the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, normalize

from .hosts import HEADS


@dataclass
class Layer:
    """The functions that a layer consists of."""

    norm: Callable[[Tensor], Tensor]
    qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    """(tokens, dim) -> queries, keys and values, (heads, tokens, head dim) each"""
    out: Callable[[Tensor], Tensor]
    """what is done with (tokens, dim) context vectors before they are added"""
    mlp: Callable[[Tensor], Tensor]
    """norm, MLP, and all that follows before its output is added"""


@dataclass
class Image:
    """One image behind the last layer."""

    rows: Tensor
    sizes: Tensor
    members: list[list[int]]
    """a row each: the tokens it is made of"""
    lengths: list[int] = field(default_factory=list)

    def spread(self) -> Tensor:
        """(tokens, dim): for each token the row that it is part of."""
        whole = self.rows.new_empty(sum(map(len, self.members)), self.rows.shape[1])
        for row, members in zip(self.rows, self.members, strict=True):
            whole[members] = row
        return whole


def attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float, sizes: Tensor | None) -> Tensor:
    """(heads, tokens, head dim) -> (tokens, dim); a key counts as often as the number of patches it stands for."""
    weights = (queries @ keys.transpose(1, 2) * scale).exp()
    if sizes is not None:
        weights = weights * sizes
    context = weights / weights.sum(-1, keepdim=True) @ values
    return context.transpose(0, 1).flatten(1)


def merge(metric: Tensor, r: int, protected: int) -> list[list[int]]:
    """The tokens of each new row; metric (tokens, dim)."""
    tokens = len(metric)
    r = min(r, (tokens - protected) // 2)
    metric = normalize(metric, dim=-1)
    even = [i for i in range(0, tokens, 2) if i >= protected]
    odd = [i for i in range(1, tokens, 2) if i >= protected]
    best = {a: max(odd, key=lambda b, a=a: float(metric[a] @ metric[b])) for a in even}
    falling = sorted(even, key=lambda a: -float(metric[a] @ metric[best[a]]))
    merged, unmerged = falling[:r], falling[r:]
    if protected:
        unmerged.sort()
    groups = [[i] for i in range(protected)] + [[a] for a in unmerged]
    return groups + [[b, *(a for a in merged if best[a] == b)] for b in odd]


def run(
    layers: list[Layer], image: Tensor, r: list[int], protected: int, scale: float, *, proportional: bool = True
) -> Image:
    """image: (tokens, dim), what enters the first layer."""
    x, sizes, members, lengths = image, torch.ones(len(image)), [[i] for i in range(len(image))], []
    for index, layer in enumerate(layers):
        queries, keys, values = layer.qkv(layer.norm(x))
        bias = sizes if proportional and sizes.max() > 1 else None
        x = x + layer.out(attend(queries, keys, values, scale, bias))
        groups = merge(keys.mean(0), r[index], protected) if r[index] else [[i] for i in range(len(x))]
        x = torch.stack([(sizes[group, None] * x[group]).sum(0) / sizes[group].sum() for group in groups])
        sizes = torch.stack([sizes[group].sum() for group in groups])
        members = [[token for i in group for token in members[i]] for group in groups]
        x = x + layer.mlp(x)
        lengths.append(len(x))
    return Image(x, sizes, members, lengths)


# -- the hosts' layers -------------------------------------------------------------------------------------------------


def _heads(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.view(len(x), heads, -1).transpose(0, 1)


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)


def _transformers(layer: nn.Module, attention: str, first: str, second: str, out: str, scales: tuple = ()) -> Layer:
    module = getattr(layer, attention)
    heads = module.config.num_attention_heads
    gammas = [getattr(layer, name).lambda1 for name in scales] or [1.0, 1.0]
    norm = _norm(getattr(layer, second))
    return Layer(
        _norm(getattr(layer, first)),
        lambda x: tuple(_heads(getattr(module, f"{part}_proj")(x), heads) for part in "qkv"),
        lambda x: getattr(module, out)(x) * gammas[0],
        lambda x: layer.mlp(norm(x)) * gammas[1],
    )


def _timm(layer: nn.Module) -> Layer:
    def qkv(x):
        q, k, v = map(_heads, layer.attn.qkv(x).chunk(3, dim=-1))
        return layer.attn.q_norm(q), layer.attn.k_norm(k), v

    gammas = [getattr(scale, "gamma", 1.0) for scale in (layer.ls1, layer.ls2)]
    second = _norm(layer.norm2)
    return Layer(
        _norm(layer.norm1), qkv, lambda x: layer.attn.proj(x) * gammas[0], lambda x: layer.mlp(second(x)) * gammas[1]
    )


def _open_clip(layer: nn.Module) -> Layer:
    module = layer.attn

    def qkv(x):
        q, k, v = map(_heads, linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1))
        return (module.ln_q(q), module.ln_k(k), v) if hasattr(module, "ln_q") else (q, k, v)

    gammas = [getattr(scale, "gamma", 1.0) for scale in (layer.ls_1, layer.ls_2)]
    behind = layer.ln_attn if hasattr(layer, "ln_attn") else lambda x: x
    second = _norm(layer.ln_2)
    return Layer(
        _norm(layer.ln_1),
        qkv,
        lambda x: behind(linear(x, module.out_proj.weight, module.out_proj.bias)) * gammas[0],
        lambda x: layer.mlp(second(x)) * gammas[1],
    )


def layers_of(modules: list[nn.Module]) -> list[Layer]:
    """The functions of a host's layers."""
    makers = {
        "CLIPEncoderLayer": lambda m: _transformers(m, "self_attn", "layer_norm1", "layer_norm2", "out_proj"),
        "SiglipEncoderLayer": lambda m: _transformers(m, "self_attn", "layer_norm1", "layer_norm2", "out_proj"),
        "ViTLayer": lambda m: _transformers(m, "attention", "layernorm_before", "layernorm_after", "o_proj"),
        "Block": _timm,
        "ResidualAttentionBlock": _open_clip,
        "CustomResidualAttentionBlock": _open_clip,
    }
    scales = ("layer_scale1", "layer_scale2")
    for name in ("Dinov2Layer", "Dinov2WithRegistersLayer"):
        makers[name] = lambda m: _transformers(m, "attention", "norm1", "norm2", "o_proj", scales)
    return [makers[type(module).__name__](module) for module in modules]


# -- the hosts' pooling ------------------------------------------------------------------------------------------------


def mean(rows: Tensor, sizes: Tensor, protected: int) -> Tensor:
    """The mean of the patches, each row weighted by its size."""
    rows, sizes = rows[protected:], sizes[protected:]
    return (sizes[:, None] * rows).sum(0) / sizes.sum()


def torch_attention(module: nn.MultiheadAttention, queries: Tensor, rows: Tensor, sizes: Tensor) -> Tensor:
    """torch's attention of queries (n, dim) over rows, each of which counts as often as its size."""
    if module.in_proj_weight is None:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    else:
        weights = module.in_proj_weight.chunk(3)
    projected = [
        linear(x, weight, bias)
        for x, weight, bias in zip((queries, rows, rows), weights, module.in_proj_bias.chunk(3), strict=True)
    ]
    heads = module.num_heads
    q, k, v = (x.view(len(x), heads, -1).transpose(0, 1) for x in projected)
    return linear(attend(q, k, v, q.shape[-1] ** -0.5, sizes), module.out_proj.weight, module.out_proj.bias)


def _siglip_head(head: nn.Module, rows: Tensor, sizes: Tensor) -> Tensor:
    x = torch_attention(head.attention, head.probe[0], rows, sizes)
    return (x + head.mlp(head.layernorm(x)))[0]


def _timm_map(pool: nn.Module, rows: Tensor, sizes: Tensor) -> Tensor:
    q = _heads(pool.q(pool.latent[0]))
    k, v = map(_heads, pool.kv(rows).chunk(2, dim=-1))
    x = pool.proj(attend(pool.q_norm(q), pool.k_norm(k), v, pool.scale, sizes))
    return (x + pool.mlp(pool.norm(x)))[0]


def _timm_output(model: nn.Module, rows: Tensor, sizes: Tensor) -> Tensor:
    rows = model.norm(rows)
    if model.global_pool == "map":
        return model.head(_timm_map(model.attn_pool, rows, sizes))
    if model.global_pool == "avg":
        return model.head(model.fc_norm(mean(rows, sizes, model.num_prefix_tokens)))
    if model.num_prefix_tokens == 2:
        return (model.head(rows[0]) + model.head_dist(rows[1])) / 2
    return model.head(rows[0])


def _open_clip_output(model: nn.Module, rows: Tensor, sizes: Tensor) -> Tensor:
    if model.attn_pool is not None:
        pool = model.attn_pool
        return model.ln_post(torch_attention(pool.attn, pool.ln_q(pool.query), pool.ln_k(rows), sizes))[0] @ model.proj
    if model.pool_type == "avg":
        return model.ln_post(mean(rows, sizes, 1)) @ model.proj
    return model.ln_post(rows[0]) @ model.proj


def _dinov2_classes(model: nn.Module, tower: nn.Module, rows: Tensor, sizes: Tensor) -> Tensor:
    rows = tower.layernorm(rows)
    protected = 1 + getattr(tower.config, "num_register_tokens", 0)
    return model.classifier(torch.cat([rows[0], mean(rows, sizes, protected)]))


OUTPUTS: dict[str, tuple[str, Callable[[nn.Module, Tensor, Tensor], Tensor]]] = {
    "clip": ("pooler_output", lambda m, rows, sizes: m.post_layernorm(rows[0])),
    "clip-model": (
        "pooler_output",
        lambda m, rows, sizes: m.visual_projection(m.vision_model.post_layernorm(rows[0])),
    ),
    "clip-projection": (
        "image_embeds",
        lambda m, rows, sizes: m.visual_projection(m.vision_model.post_layernorm(rows[0])),
    ),
    "clip-classes": ("logits", lambda m, rows, sizes: m.classifier(mean(rows, sizes, 1))),
    "siglip": ("pooler_output", lambda m, rows, sizes: _siglip_head(m.head, m.post_layernorm(rows), sizes)),
    "siglip-model": (
        "pooler_output",
        lambda m, rows, sizes: _siglip_head(m.vision_model.head, m.vision_model.post_layernorm(rows), sizes),
    ),
    "siglip-classes": (
        "logits",
        lambda m, rows, sizes: m.classifier(mean(m.vision_model.post_layernorm(rows), sizes, 0)),
    ),
    "vit": ("pooler_output", lambda m, rows, sizes: m.pooler(m.layernorm(rows)[None])[0]),
    "vit-classes": ("logits", lambda m, rows, sizes: m.classifier(m.vit.layernorm(rows)[0])),
    "dinov2": ("pooler_output", lambda m, rows, sizes: m.layernorm(rows)[0]),
    "dinov2-swiglu": ("pooler_output", lambda m, rows, sizes: m.layernorm(rows)[0]),
    "dinov2-classes": ("logits", lambda m, rows, sizes: _dinov2_classes(m, m.dinov2, rows, sizes)),
    "dinov2-registers": ("pooler_output", lambda m, rows, sizes: m.layernorm(rows)[0]),
    "dinov2-registers-classes": (
        "logits",
        lambda m, rows, sizes: _dinov2_classes(m, m.dinov2_with_registers, rows, sizes),
    ),
    "open_clip-model": ("output", lambda m, rows, sizes: _open_clip_output(m.visual, rows, sizes)),
    "open_clip-timm": ("output", lambda m, rows, sizes: m.head(_timm_output(m.trunk, rows, sizes))),
}
"""Host -> an output of it, and how that comes from one image's rows and their sizes."""


def output_of(name: str) -> tuple[str, Callable[[nn.Module, Tensor, Tensor], Tensor]]:
    if name in OUTPUTS:
        return OUTPUTS[name]
    return "output", _timm_output if name.startswith("timm") else _open_clip_output
