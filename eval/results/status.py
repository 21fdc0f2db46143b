# SPDX-License-Identifier: Apache-2.0
"""Whether a row has numbers, and if it has none, why."""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.errors import BudgetError, UnsupportedStageError

OK = "ok"
UNDER_FLOOR = "under its floor"
UNSUPPORTED = "unsupported"
UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Refusal:
    """Why a row has no numbers: its budget is under the floor, or the model cannot do what the method needs."""

    status: str
    """`UNDER_FLOOR` or `UNSUPPORTED`"""
    reason: str
    """the error's message"""
    floor: float | None
    """the smallest keep ratio that the method can meet; None if the status is `UNSUPPORTED`"""

    @classmethod
    def of(cls, error: BudgetError | UnsupportedStageError) -> Refusal:
        """From what `vtprune.prune` raised.

        Raises:
            BudgetError: `error` itself, if it names no floor. Then the configuration has a mistake.
        """
        floor = error.floor if isinstance(error, BudgetError) else None
        if isinstance(error, BudgetError) and floor is None:
            raise error
        return cls(UNSUPPORTED if floor is None else UNDER_FLOOR, str(error), floor)


def status_text(status: str, floor: float | None) -> str:
    """The status for tables, with the floor if there is one: `under its floor (21.9%)`."""
    return status if floor is None else f"{status} ({floor:.1%})"
