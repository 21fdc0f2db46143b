# SPDX-License-Identifier: Apache-2.0
"""Conditions on the values of tensors, asked together: an accelerator has to be waited for at each answer."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

from vtprune.errors import VTPruneError

Result = TypeVar("Result")

_PENDING: ContextVar[list[tuple[Tensor, Callable[[], str] | None]] | None] = ContextVar("pending", default=None)
_CAREFUL: ContextVar[bool] = ContextVar("careful", default=False)


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


def with_short_cut(quick: Callable[[], tuple[Result, Tensor]], careful: Callable[[], Result]) -> Result:
    """The result of `quick`, which also says whether it is right, a bool tensor of one element; otherwise of `careful`.

    Within `asked_together` that is asked at its end, and if it is not right, all is done again.
    """
    if _CAREFUL.get():
        return careful()
    result, right = quick()
    pending = _PENDING.get()
    if pending is None:
        return result if bool(right) else careful()
    pending.append((right.reshape(()), None))
    return result


def asked_together(work: Callable[[], Result]) -> Result:
    """The result of `work`. What is required in it is read at its end, with one wait for the device.

    The first condition that does not hold is raised. It goes before an exception of another kind that follows from it.
    If a short cut did not give the right result, `work` is done again without short cuts.
    """
    pending: list[tuple[Tensor, Callable[[], str] | None]] = []
    token = _PENDING.set(pending)
    try:
        result = work()
    except VTPruneError:
        raise
    except Exception:
        _ask(pending)
        raise
    finally:
        _PENDING.reset(token)
    if _ask(pending):
        return result
    careful = _CAREFUL.set(True)
    try:
        return asked_together(work)
    finally:
        _CAREFUL.reset(careful)


def _ask(pending: list[tuple[Tensor, Callable[[], str] | None]]) -> bool:
    """Read all conditions at once, and raise the first required one that does not hold; whether short cuts were right.

    What is required is not raised if it may follow from a short cut.
    """
    if not pending:
        return True
    device = pending[-1][0].device
    answers = torch.stack([holds.to(device) for holds, _ in pending]).tolist()
    for holds, (_, message) in zip(answers, pending, strict=True):
        if not holds and message is None:
            return False
        if not holds and message is not None:
            raise VTPruneError(message())
    return True
