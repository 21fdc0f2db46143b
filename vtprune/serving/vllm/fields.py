# SPDX-License-Identifier: Apache-2.0
"""Under which names plans travel beside pixels through vLLM."""

from __future__ import annotations

KINDS = ("image", "video")


def field(kind: str) -> str:
    """The name beside the pixels of a kind."""
    return f"vtprune_{kind}"
