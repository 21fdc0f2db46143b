# SPDX-License-Identifier: Apache-2.0
"""Latent attention (MLA): keys and values of a token are expanded from one short vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Index:
    """An index of keys, in which a layer looks up the columns that each token attends to."""

    heads: int
    width: int
    """of one head; all heads share one key"""
    d_in: int
    """width of what its queries are made from"""
    pool: int = 0
    """columns that have one key together, a weighed mean; 0 if each has its own"""

    @classmethod
    def of(cls, config: Any) -> Index:
        d_in = getattr(config, "q_lora_rank", None) or config.hidden_size
        return cls(config.index_n_heads, config.index_head_dim, d_in, getattr(config, "index_kpool", 0))

    @property
    def cached(self) -> int:
        """Numbers that the KV cache holds of a token: its key; for pools also its weight, and whether it is one."""
        return 2 * self.width + 1 if self.pool else self.width

    def flops(self, d: int, n: float) -> float:
        weights = self.d_in * self.heads * self.width + d * (self.width * (2 if self.pool else 1) + self.heads)
        keys = n // self.pool if self.pool else n  # of whole pools
        return 2 * n * weights + 2 * n * keys * self.heads * (self.width + 1)  # scores by head, and their weighted sum


@dataclass(frozen=True)
class Facts:
    """What differs between the layers of one model."""

    indexes: bool
    """whether it has an index of its own"""
    rotates: bool
    """whether its queries and keys are rotated"""


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
    gate: int = 0
    """width of the gate of what the heads put out, all together; 0 without one"""
    shares: bool = False
    """whether it reads the keys and values of an earlier layer"""
    index: Index | None = None

    @classmethod
    def of(cls, config: Any, facts: Facts, *, shares: bool) -> LatentAttention:
        """config: of the layer."""
        heads, query_rank = config.num_attention_heads, getattr(config, "q_lora_rank", None) or 0
        plain, rotated = config.qk_nope_head_dim, config.qk_rope_head_dim
        index = Index.of(config) if facts.indexes else None
        return cls(
            heads=heads,
            plain=plain if facts.rotates else plain + rotated,
            rotated=rotated if facts.rotates else 0,
            d_v=config.v_head_dim,
            rank=config.kv_lora_rank,
            query_rank=query_rank,
            gate=heads * {"dots3_note_text": 1, "hy_v4_vl_text": config.v_head_dim}.get(config.model_type, 0),
            shares=shares,
            index=index,
        )

    @property
    def cached(self) -> int:
        """Numbers that the KV cache holds of a token: the short vector, the rotated key, and that of the index."""
        own = 0 if self.shares else self.rank + self.rotated
        return own + (0 if self.index is None else self.index.cached)

    def flops(self, d: int, n: float) -> float:
        """FLOPs for n tokens whose hidden states are d wide."""
        d_q = self.plain + self.rotated
        weights = self.query_rank * (d + self.heads * d_q) if self.query_rank else d * self.heads * d_q
        weights += 0 if self.shares else d * (self.rank + self.rotated)
        weights += self.rank * self.heads * (self.plain + self.d_v)
        weights += self.heads * self.d_v * d + self.gate * d
        index = 0 if self.index is None else self.index.flops(d, n)
        return 2 * n * weights + 2 * n * n * self.heads * (d_q + self.d_v) + index  # QK^T and AV


def facts_by_layer(config: Any, kinds: list[str]) -> list[Facts]:
    """Of each decoder layer, of the kinds as transformers names them."""
    own = getattr(config, "indexer_types", None) or ["full"] * len(kinds)
    rotates = getattr(config, "no_rope_layers", None) or [True] * len(kinds)
    return [Facts(kind == "indexed_attention" and own[i] == "full", bool(rotates[i])) for i, kind in enumerate(kinds)]
