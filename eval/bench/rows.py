# SPDX-License-Identifier: Apache-2.0
"""The rows of the table: the full model, then every method at every budget."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import vtprune
from vtprune.errors import BudgetError, UnsupportedStageError
from vtprune.eval.bench.config import BenchConfig
from vtprune.eval.results.status import OK, UNDER_FLOOR, Refusal
from vtprune.methods import list_methods
from vtprune.stages.choosing import Profile


@dataclass
class Row:
    """A line of the table: the full model, or a method at a budget."""

    label: str
    """for people: the method and its parameters"""
    method: Mapping[str, Any] | None = None
    """what `vtprune.prune` takes; None for the full model"""
    keep_ratio: float | None = 1.0
    """as asked; None for the method's published schedule"""
    status: str = OK
    reason: str | None = None
    floor: float | None = None

    def session(self, model: Any, *, profile: Profile = True) -> AbstractContextManager[vtprune.Session | None]:
        """The context that the row's passes run in. profile: see `vtprune.prune`.

        Raises BudgetError or UnsupportedStageError if the model cannot be pruned like this.
        """
        if self.method is None:
            return nullcontext()
        budget = {} if self.keep_ratio is None else {"keep_ratio": self.keep_ratio}
        return vtprune.prune(model, self.method, profile=profile, **budget)

    def refused(self, error: BudgetError | UnsupportedStageError) -> None:
        """Notes why the row has no numbers. Raises `error` if it is a mistake in the configuration."""
        refusal = Refusal.of(error)
        self.status, self.reason, self.floor = refusal.status, refusal.reason, refusal.floor


def table_rows(config: BenchConfig, model: Any) -> list[Row]:
    """The full model, then every method at every budget.

    A method with a budget under its floor also gets a row of its published schedule, if it has one.
    """
    rows = [Row("full")]
    for entry in config.methods:
        spec = {"name": entry.name, **entry.params}
        budgets: list[float | None] = list(entry.keep_ratios or config.keep_ratios)
        for keep_ratio in budgets:
            row = Row(entry.label, spec, keep_ratio)
            try:
                row.session(model)
            except (BudgetError, UnsupportedStageError) as error:
                row.refused(error)
            rows.append(row)
            if row.status == UNDER_FLOOR and None not in budgets and not list_methods()[entry.name].needs_budget:
                budgets.append(None)
    return rows
