# SPDX-License-Identifier: Apache-2.0
"""Suites of lmms-eval's tasks by name, from the files in `configs/lmms`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vtprune.config import nearest
from vtprune.errors import ConfigError

_FOLDER = Path(__file__).parent.parent / "configs" / "lmms"
_TABLE = "suites"


def suite_names() -> list[str]:
    """What may stand behind `suite:`."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml") if path.stem != _TABLE)


def suite_tasks(name: str) -> list[str]:
    """lmms-eval's names of the tasks of a suite, in its order. Raises ConfigError if there is no such suite."""
    if name not in suite_names():
        raise ConfigError(f"suite:{name}: there is no such suite; {nearest(name, suite_names())}")
    return yaml.safe_load((_FOLDER / f"{name}.yaml").read_text())["tasks"].split(",")


@cache
def suite_table() -> dict[str, dict[str, Any]]:
    """lmms-eval's name of a task -> its row of `suites.yaml`."""
    return {row["task"]: row for row in yaml.safe_load((_FOLDER / f"{_TABLE}.yaml").read_text())}
