# SPDX-License-Identifier: Apache-2.0
"""Attention to a few blocks of columns, which each token looks up in an index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtprune.cost.mixers.attention import Attention


@dataclass(frozen=True)
class BlockIndex:
    """A layer of attention with an index of blocks (Qwen4). Attention is counted over all columns, as it is computed
    where a mask hides those that were not found."""

    attention: Attention
    heads: int
    """query heads of the index; there is one key head"""
    width: int
    """width of a head of the index"""
    block: int
    """columns of a block"""

    @classmethod
    def of(cls, config: Any) -> BlockIndex:
        return cls(
            attention=Attention.of(config, gated=True),
            heads=config.indexer_n_heads,
            width=config.indexer_head_dim,
            block=config.indexer_compress_ratio,
        )

    @property
    def cached(self) -> int:
        """Numbers that the KV cache holds of a token, its key of the index included."""
        return self.attention.cached + self.width

    def flops(self, d: int, n: float) -> float:
        """FLOPs for n tokens whose hidden states are d wide."""
        blocks = n // self.block
        # Each token sees the whole blocks up to its own column.
        seen = self.block * blocks * (blocks - 1) / 2 + blocks * (n - self.block * blocks + 1)
        projections = 2 * n * d * (self.heads + 1) * self.width
        scores = 2 * int(seen) * self.heads * self.width
        return self.attention.flops(d, n) + projections + scores
