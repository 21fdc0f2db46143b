# SPDX-License-Identifier: Apache-2.0
"""Whether a model supports a method, asked of the session itself; nothing runs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vtprune.errors import BudgetError, UnsupportedStageError
from vtprune.methods import MethodLike, list_methods
from vtprune.session import prune


def why_not(model: nn.Module, method: MethodLike) -> str | None:
    """The reason why a model refuses a method with its budget; None if it takes it.

    Args:
        model: loaded, or without weights on the device "meta".
        method: as `vtprune.prune` takes it.

    Raises:
        UnsupportedModelError, ConfigError: the question makes no sense: an unknown family, a misspelt parameter.
    """
    try:
        prune(model, method)
    except (UnsupportedStageError, BudgetError) as error:
        return str(error)
    return None


_BUDGET = {"keep_ratio": 0.5}
_UNDER_EVERY_FLOOR = {"keep_ratio": 1e-6}


@dataclass(frozen=True)
class Fit:
    """What a model says of a method."""

    reason: str | None
    """why it refuses the method; None if it supports it"""
    floor: float = 0.0
    """smallest keep ratio that it supports, as far as that is known before there is a prompt"""


def fits(model: nn.Module) -> dict[str, Fit]:
    """Every method's name -> what a model, which may be without weights, says of it."""
    return {name: _fit(model, name) for name in list_methods()}


def _fit(model: nn.Module, name: str) -> Fit:
    needs_budget = list_methods()[name].needs_budget
    reason = why_not(model, {"name": name, **(_BUDGET if needs_budget else {})})
    if reason is not None or not needs_budget and why_not(model, {"name": name, **_BUDGET}) is not None:
        return Fit(reason)
    try:
        prune(model, {"name": name, **_UNDER_EVERY_FLOOR})
    except BudgetError as error:
        return Fit(None, error.floor or 0.0)
    return Fit(None)
