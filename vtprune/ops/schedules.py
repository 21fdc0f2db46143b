# SPDX-License-Identifier: Apache-2.0
"""Schedules: how the number of visual tokens falls from layer to layer."""


def linear_decay(full: int, empty: int, depth: int, entering: int) -> list[int]:
    """Visual tokens alive in each decoder layer under AIM's schedule (arXiv 2412.03248).

    All of them up to and including layer ``full``, none from layer ``empty`` on, in equal steps, rounded down, between.

    Args:
        full: 0-based, the last layer that sees everything; at least 0, below ``empty``.
        empty: 0-based, the first layer that sees nothing.
        depth: decoder layers.
        entering: visual tokens that reach the LLM.

    Returns:
        ``depth`` counts.
    """
    return [entering * min(max(empty - layer, 0), empty - full) // (empty - full) for layer in range(depth)]
