# SPDX-License-Identifier: Apache-2.0
"""A block of a vision transformer, in parts, from recorded weights: what reductions between layers are checked with."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from . import Vector


@dataclass(frozen=True)
class Block:
    """A pre-norm block. Weights have timm's names."""

    weights: Mapping[str, Tensor]
    heads: int
    eps: float

    def heads_of(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) -> queries, keys and values, (3, batch, heads, tokens, head_dim)."""
        qkv = self._linear("attn.qkv", self._norm("norm1", x))
        return qkv.view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)

    def scale(self) -> float:
        return (len(self.weights["attn.proj.weight"]) // self.heads) ** -0.5

    def probabilities(self, queries: Tensor, keys: Tensor, sizes: Tensor | None = None) -> Tensor:
        """(batch, heads, tokens, tokens)"""
        logits = queries @ keys.transpose(-1, -2) * self.scale()
        return (logits if sizes is None else logits + sizes.log()[:, None, None]).softmax(-1)

    def projected(self, attended: Tensor) -> Tensor:
        """(batch, heads, tokens, head_dim) -> (batch, tokens, dim)"""
        return self._linear("attn.proj", attended.transpose(1, 2).flatten(2))

    def attend(self, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x with the attention's output added, and the keys. Sizes bias the attention to the tokens."""
        queries, keys, values = self.heads_of(x)
        bias = None if sizes is None else sizes.log()[:, None, None].expand(-1, -1, x.shape[1], -1)
        return x + self.projected(scaled_dot_product_attention(queries, keys, values, attn_mask=bias)), keys

    def feed_forward(self, x: Tensor) -> Tensor:
        hidden = gelu(self._linear("mlp.fc1", self._norm("norm2", x)))
        return x + self._linear("mlp.fc2", hidden)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], self.eps)


def timm_blocks(v: Vector) -> list[Block]:
    """The blocks whose weights are recorded as `w.<block>.<name>`."""
    by_block: dict[int, dict[str, Tensor]] = {}
    for name, weight in v.weights().items():
        index, _, own = name.partition(".")
        by_block.setdefault(int(index), {})[own] = weight
    eps = v["ln_eps"] if "ln_eps" in v else v["eps"]
    return [Block(fused_projections(by_block[index]), v["heads"], eps) for index in sorted(by_block)]


def fused_projections(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a CLIP layer of transformers, or of a block of timm, with timm's names."""
    if "norm1.weight" in weights:
        return dict(weights)
    names = {"layer_norm": "norm", "self_attn.out_proj": "attn.proj"}
    fused = {
        f"attn.qkv.{kind}": torch.cat([weights[f"self_attn.{part}_proj.{kind}"] for part in "qkv"])
        for kind in ("weight", "bias")
    }
    for name, weight in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        fused[name] = weight
    return fused
