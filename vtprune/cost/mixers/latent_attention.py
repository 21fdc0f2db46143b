# SPDX-License-Identifier: Apache-2.0
"""Latent attention (MLA): keys and values of a token are expanded from one short vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LatentAttention:
    """The widths of a layer of latent attention (DeepSeek-V3, Mistral 4)."""

    heads: int
    plain: int
    """width of a query or key head without rotation"""
    rotated: int
    """width of a query or key head with rotation; all heads share one such key"""
    d_v: int
    """width of a value head"""
    rank: int
    """width of the vector that keys and values of a token are expanded from"""
    query_rank: int
    """width of the vector that the queries of a token are expanded from; 0 if they are not"""

    @classmethod
    def of(cls, config: Any) -> LatentAttention:
        return cls(
            heads=config.num_attention_heads,
            plain=config.qk_nope_head_dim,
            rotated=config.qk_rope_head_dim,
            d_v=config.v_head_dim,
            rank=config.kv_lora_rank,
            query_rank=getattr(config, "q_lora_rank", None) or 0,
        )

    @property
    def cached(self) -> int:
        """Numbers that the KV cache holds of a token: the short vector, and the rotated key."""
        return self.rank + self.rotated

    def flops(self, d: int, n: float) -> float:
        """FLOPs for n tokens whose hidden states are d wide."""
        d_q = self.plain + self.rotated
        queries = self.query_rank * (d + self.heads * d_q) if self.query_rank else d * self.heads * d_q
        keys_values = d * (self.rank + self.rotated) + self.rank * self.heads * (self.plain + self.d_v)
        weights = queries + keys_values + self.heads * self.d_v * d
        return 2 * n * weights + 2 * n * n * self.heads * (d_q + self.d_v)  # QK^T and AV
