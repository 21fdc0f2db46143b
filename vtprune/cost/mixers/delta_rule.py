# SPDX-License-Identifier: Apache-2.0
"""Linear attention by the gated delta rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class DeltaRule:
    """The widths of a layer of linear attention by the gated delta rule (Qwen3-Next, Qwen3.5, GLM-5 Next)."""

    chunk: ClassVar[int] = 64
    """Tokens that are computed together; the last ones are filled up to so many."""

    heads: int
    """value heads; each has a state of its own"""
    d_k: int
    """width of one key head"""
    d_v: int
    """width of one value head"""
    keys: int
    """width of all key (or query) heads together"""
    kernel: int
    """tokens that the convolution over queries, keys and values sees"""
    rank: int = 0
    """width of the vectors that both gates, each as wide as all values, are expanded from; 0 if one gate is as wide as
    all values, and the other has one number a head"""

    @classmethod
    def of(cls, config: Any) -> DeltaRule:
        if hasattr(config, "linear_head_dim"):
            heads, width = config.linear_num_heads, config.linear_head_dim
            kernel = config.linear_conv_kernel_dim
            return cls(heads=heads, d_k=width, d_v=width, keys=heads * width, kernel=kernel, rank=width)
        return cls(
            heads=config.linear_num_value_heads,
            d_k=config.linear_key_head_dim,
            d_v=config.linear_value_head_dim,
            keys=config.linear_num_key_heads * config.linear_key_head_dim,
            kernel=config.linear_conv_kernel_dim,
        )

    @property
    def cached(self) -> int:
        """Numbers that the KV cache holds of a token: none, but a state of all of them."""
        return 0

    def flops(self, d: int, n: float) -> float:
        """FLOPs for n tokens whose hidden states are d wide."""
        values = self.heads * self.d_v
        # Queries, keys, values, the output, one number a head, and two gates.
        gates = 2 * self.rank * (d + values) if self.rank else d * (values + self.heads)
        projections = 2 * n * (d * (2 * self.keys + 2 * values + self.heads) + gates)
        convolution = 2 * n * (2 * self.keys + values) * self.kernel
        within = self.chunk * (3 * self.d_k + 2 * self.d_v)  # a token and those of its chunk
        state = 3 * self.d_k * self.d_v  # reading it for values and outputs, and writing it
        filled = math.ceil(n / self.chunk) * self.chunk
        return projections + convolution + 2 * filled * self.heads * (within + state)
