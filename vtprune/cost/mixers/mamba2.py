# SPDX-License-Identifier: Apache-2.0
"""Mamba2: a state of each head, which decays and takes in each token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mamba2:
    """The widths of a Mamba2 layer (Nemotron-H)."""

    heads: int
    head_dim: int
    state: int
    """width of a head's state"""
    groups: int
    """of heads that share what they read and write states by"""
    kernel: int
    """tokens that the convolution sees"""
    chunk: int
    """tokens that are computed together; the last ones are filled up to so many"""

    @classmethod
    def of(cls, config: Any) -> Mamba2:
        return cls(
            heads=config.mamba_num_heads,
            head_dim=config.mamba_head_dim,
            state=config.ssm_state_size,
            groups=config.n_groups,
            kernel=config.conv_kernel,
            chunk=config.chunk_size,
        )

    @property
    def cached(self) -> int:
        """Numbers that the KV cache holds of a token: none, but a state of all of them."""
        return 0

    def flops(self, d: int, n: float) -> float:
        """FLOPs for n tokens whose hidden states are d wide."""
        inner = self.heads * self.head_dim
        convolved = inner + 2 * self.groups * self.state
        # Gate, what is convolved, one number a head, and the output.
        projections = 2 * n * d * (inner + convolved + self.heads + inner)
        chunks = math.ceil(n / self.chunk)
        within = self.chunk * (self.state + self.head_dim)  # a token and those of its chunk
        state = self.state * self.head_dim  # writing it, and reading it
        scan = 2 * chunks * self.heads * (self.chunk * (within + 2 * state) + state)  # and passing it on
        return projections + 2 * n * convolved * self.kernel + scan
