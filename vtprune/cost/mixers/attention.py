# SPDX-License-Identifier: Apache-2.0
"""Attention of every token to all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Attention:
    """The widths of a layer of attention, grouped queries included."""

    d_q: int
    """width of all query heads together"""
    d_kv: int
    """width of all key (or value) heads together; below `d_q` with grouped-query attention"""
    gated: bool
    """whether the queries' projection also puts out a gate of the same width"""
    head_gates: int = 0
    """heads that have a gate of one number each; 0 if they have none"""
    projected: int = 2
    """how many of keys and values have a projection of their own: neither where an earlier layer's are read, one where
    values are the keys before their norm"""

    @classmethod
    def of(cls, config: Any, *, gated: bool, projected: int = 2) -> Attention:
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        has_gates = getattr(config, "use_attention_gate", False) or config.model_type == "step3p5"
        head_gates = has_gates * heads
        return cls(
            d_q=heads * head_dim, d_kv=kv_heads * head_dim, gated=gated, head_gates=head_gates, projected=projected
        )

    @property
    def cached(self) -> int:
        """Numbers that the KV cache holds of a token."""
        return 2 * self.d_kv if self.projected else 0

    def flops(self, d: int, n: float) -> float:
        """FLOPs for n tokens whose hidden states are d wide."""
        queries = (3 if self.gated else 2) * self.d_q  # q and o
        projections = 2 * n * d * (queries + self.projected * self.d_kv + self.head_gates)  # those, k and v
        return projections + 2 * (2 * n * n * self.d_q)  # QK^T and AV
