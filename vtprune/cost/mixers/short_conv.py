# SPDX-License-Identifier: Apache-2.0
"""Short convolutions between two gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ShortConv:
    """A gated convolution of each feature over the last tokens (LFM2, LFM3)."""

    kernel: int
    """tokens that the convolution sees"""

    @classmethod
    def of(cls, config: Any) -> ShortConv:
        return cls(kernel=config.conv_L_cache)

    @property
    def cached(self) -> int:
        """Numbers that the KV cache holds of a token: none, but a state of the last ones."""
        return 0

    def flops(self, d: int, n: float) -> float:
        """FLOPs for n tokens whose hidden states are d wide."""
        return 2 * n * d * (4 * d + self.kernel)  # two gates, what they gate, and the output
