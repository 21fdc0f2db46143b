# SPDX-License-Identifier: Apache-2.0
"""No mixing: layers that look at each token alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Nothing:
    """Of a layer that is an MLP or experts alone."""

    @property
    def cached(self) -> int:
        """Numbers that the KV cache holds of a token."""
        return 0

    def flops(self, d: int, n: float) -> float:
        """FLOPs for n tokens whose hidden states are d wide."""
        return 0
