# SPDX-License-Identifier: Apache-2.0
"""Conditions on the values of tensors, asked together: an accelerator has to be waited for at each answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from vtprune.errors import VTPruneError

_PENDING: ContextVar[list[tuple[Tensor, Callable[[], str]]] | None] = ContextVar("pending conditions", default=None)


def require(holds: Tensor, error: str | Callable[[], str]) -> None:
    """Raise VTPruneError unless `holds` is True, a bool tensor of one element; within `asked_together`, at its end.

    error: the message, or a function that makes it, which may read tensors.
    """
    message = error if callable(error) else lambda: error
    pending = _PENDING.get()
    if pending is not None:
        pending.append((holds.reshape(()), message))
    elif not bool(holds):
        raise VTPruneError(message())


@contextmanager
def asked_together() -> Iterator[None]:
    """What is required in this context is read at its end, with one wait for the device.

    The first condition that does not hold is raised. It goes before an exception of another kind that follows from it.
    """
    pending: list[tuple[Tensor, Callable[[], str]]] = []
    token = _PENDING.set(pending)
    try:
        yield
    except VTPruneError:
        raise
    except Exception:
        _ask(pending)
        raise
    finally:
        _PENDING.reset(token)
    _ask(pending)


def _ask(pending: list[tuple[Tensor, Callable[[], str]]]) -> None:
    """Read all conditions at once, and raise the first that does not hold."""
    if not pending:
        return
    device = pending[-1][0].device
    held = torch.stack([holds.to(device) for holds, _ in pending]).tolist()
    for holds, (_, message) in zip(held, pending, strict=True):
        if not holds:
            raise VTPruneError(message())
