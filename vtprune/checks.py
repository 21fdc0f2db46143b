# SPDX-License-Identifier: Apache-2.0
"""Conditions on the values of tensors, asked together: an accelerator has to be waited for at each answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from vtprune.devices import read
from vtprune.errors import VTPruneError

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Condition:
    """Something that has to hold."""

    holds: Tensor
    """A bool tensor of one element."""
    error: str | Callable[[], str]
    """What the error says if it does not hold, or a function that makes it, which may read tensors."""
    kind: type[VTPruneError] = VTPruneError
    """The error."""


@dataclass
class _Pending:
    """What is read at the end of `asked_together`."""

    asked: list[Condition | Tensor] = field(default_factory=list)
    """Conditions, and whether short cuts are right, in order."""
    values: list[tuple[tuple[Tensor, ...], list[Tensor]]] = field(default_factory=list)
    """Tensors, and the list for their copies."""

    def settle(self) -> bool:
        """Read everything at once, and raise the first condition that does not hold; whether short cuts were right.

        What is required is not raised if it may follow from a short cut.
        """
        flags = [one.holds if isinstance(one, Condition) else one for one in self.asked]
        wanted = [value for values, _ in self.values for value in values]
        if not flags and not wanted:
            return True
        copies = read(*flags, *wanted)
        for one, holds in zip(self.asked, copies, strict=False):
            if not bool(holds):
                if not isinstance(one, Condition):
                    return False
                raise one.kind(one.error() if callable(one.error) else one.error)
        del copies[: len(flags)]
        for values, filled in self.values:
            filled += copies[: len(values)]
            del copies[: len(values)]
        return True


_PENDING: ContextVar[_Pending | None] = ContextVar("pending", default=None)
_CAREFUL: ContextVar[bool] = ContextVar("careful", default=False)


def require_all(conditions: Iterable[Condition]) -> None:
    """Raise the error of the first condition that does not hold; within `asked_together`, at its end."""
    pending = _PENDING.get() or _Pending()
    pending.asked += conditions
    if _PENDING.get() is None:
        pending.settle()


def require(holds: Tensor, error: str | Callable[[], str], kind: type[VTPruneError] = VTPruneError) -> None:
    """The same for one condition; see `Condition` for the arguments."""
    require_all([Condition(holds, error, kind)])


def read_with_conditions(*values: Tensor) -> list[Tensor]:
    """Tensors of integers or flags on the CPU; within `asked_together` the list is empty until its end."""
    pending = _PENDING.get()
    if pending is None:
        return read(*values)
    filled: list[Tensor] = []
    pending.values.append((values, filled))
    return filled


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
    pending.asked.append(right)
    return result


def asked_together(work: Callable[[], Result]) -> Result:
    """The result of `work`. What is required in it is read at its end, with one wait for the device.

    The first condition that does not hold is raised. It goes before an exception of another kind that follows from it.
    If a short cut did not give the right result, `work` is done again without short cuts.
    """
    pending = _Pending()
    token = _PENDING.set(pending)
    try:
        result = work()
    except VTPruneError:
        raise
    except Exception:
        pending.settle()
        raise
    finally:
        _PENDING.reset(token)
    if pending.settle():
        return result
    token_careful = _CAREFUL.set(True)
    try:
        return asked_together(work)
    finally:
        _CAREFUL.reset(token_careful)
