# SPDX-License-Identifier: Apache-2.0
"""Counters of visual tokens, which stand at vLLM's own `/metrics`.

The front end counts: there a request is given its number of placeholders, and there vLLM's page of metrics is made.
"""

from __future__ import annotations

from prometheus_client import Counter

_SEEN, _KEPT, _DROPPED = (
    Counter(f"vtprune:tokens_{name}", f"Visual tokens {meaning}, by method.", ["method"])
    for name, meaning in (
        ("seen", "of the images and videos of requests that asked for pruning"),
        ("kept", "of these that the language model is given"),
        ("dropped", "of these that it is not given"),
    )
)


def count(method: str, total: int, kept: int) -> None:
    """Add an image or video of `total` tokens, of which a method keeps `kept`, whether or not a cache holds it."""
    _SEEN.labels(method).inc(total)
    _KEPT.labels(method).inc(kept)
    _DROPPED.labels(method).inc(total - kept)
