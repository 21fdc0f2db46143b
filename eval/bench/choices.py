# SPDX-License-Identifier: Apache-2.0
"""Watches methods while they choose tokens: how long it takes, and how many FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from vtprune.methods.base import Method
from vtprune.methods.in_layers import InLayers


@contextmanager
def around_choices(parts: Iterable[Method], context: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """While it lasts, each choice of the methods runs in a context of its own, which `context` makes.

    Args:
        parts: methods of one stage each. Other methods of their classes are watched, too.
        context: makes a context manager.
    """
    changed: list[tuple[type, str, Any]] = []
    try:
        for cls in {type(part) for part in parts}:
            name = "reduce" if issubclass(cls, InLayers) else "choose"
            changed.append((cls, name, vars(cls).get(name)))
            setattr(cls, name, _within(getattr(cls, name), context))
        yield
    finally:
        for cls, name, own in changed:
            if own is None:  # inherited
                delattr(cls, name)
            else:
                setattr(cls, name, own)


def _within(choose: Callable, context: Callable[[], AbstractContextManager]) -> Callable:
    @wraps(choose)
    def watched(self: Method, tokens: Any) -> Any:
        with context():
            return choose(self, tokens)

    return watched


@contextmanager
def counted_choices(parts: Iterable[Method]) -> Iterator[list[int]]:
    """While it lasts, the FLOPs of each choice are added to the list: two for each multiply-add of matrix products.

    What a method reads counts where it is computed for the choice, as rows of the language model's attention are. What
    hooks note on the way, as attention in the encoder, does not.
    """
    found: list[int] = []

    @contextmanager
    def counting() -> Iterator[None]:
        with FlopCounterMode(display=False) as counter:
            yield
        found.append(counter.get_total_flops())

    with around_choices(parts, counting):
        yield found
