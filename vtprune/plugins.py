# SPDX-License-Identifier: Apache-2.0
"""Methods and adapters of other packages, which register them by entry points."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any


def load_plugins(group: str, register: Callable[[Any], object]) -> None:
    """Registers what the entry points of `group` name.

    One that fails is left out with a warning that names its package: who has it installed may not even want it now.
    """
    for entry in entry_points(group=group):
        try:
            register(entry.load())
        except Exception as error:
            package = entry.dist.name if entry.dist else "an unknown package"
            warnings.warn(
                f"{package}: its plug-in {entry.name!r} ({entry.value}, group {group}) is left out: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
