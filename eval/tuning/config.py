# SPDX-License-Identifier: Apache-2.0
"""What `vtprune tune` is asked for: a model, a task, one goal, and how long it may take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from vtprune.errors import ConfigError
from vtprune.eval.config import EvalConfig

GoalKind = Literal["retain", "flops", "latency", "kv"]

_NAMES = {
    "retain": "score",
    "flops": "FLOPs of the prefill",
    "latency": "latency",
    "kv": "KV cache",
}


@dataclass(frozen=True)
class Goal:
    """The one number that the setting has to meet."""

    kind: GoalKind
    value: float
    """of `retain`: the least share of the full model's score; of a cost: the largest share of the full model's"""
    seconds: bool = False
    """whether `value` is seconds for each example, and no share; for `latency` only"""

    @classmethod
    def of(cls, **given: Any) -> Goal:
        """The goal among the options; `latency` may be a share, or seconds with their unit: "0.8s".

        Raises:
            ConfigError: none is given, several are, or the value makes no sense.
        """
        found = {kind: value for kind, value in given.items() if value is not None}
        options = ", ".join(f"--{kind}" for kind in get_args(GoalKind))
        if len(found) != 1:
            got = " and ".join(f"--{kind}" for kind in found) or "none"
            raise ConfigError(f"expected exactly one goal of {options}; got {got}")
        ((kind, value),) = found.items()
        text = str(value)
        seconds = kind == "latency" and text.endswith("s")
        try:
            number = float(text.removesuffix("s") if seconds else text)
        except ValueError:
            number = 0.0
        if number <= 0 or (number >= 1 and not seconds):
            more = ", or seconds for each example: 0.8s" if kind == "latency" else ""
            raise ConfigError(f"--{kind} {value}: expected a share between 0 and 1{more}")
        return cls(kind, number, seconds)

    def __str__(self) -> str:
        return f"--{self.kind} {self.value:g}{'s' if self.seconds else ''}"

    @property
    def words(self) -> str:
        """For sentences: "at most 40 % of the full model's KV cache"."""
        if self.seconds:
            return f"at most {self.value:g} s an example"
        least = "at least" if self.kind == "retain" else "at most"
        return f"{least} {100 * self.value:g} % of the full model's {_NAMES[self.kind]}"


def task_entry(text: str) -> Any:
    """What `--task` names, as an evaluation file has it: a name, or a file with own data."""
    return {"file": text} if text.endswith((".jsonl", ".csv")) else text


@dataclass(frozen=True)
class TuneConfig:
    """The settings of `vtprune tune`."""

    goal: Goal
    evaluation: EvalConfig
    """the model, the task and how they run; it has no methods, because the race chooses them"""
    minutes: float | None = None
    """how long the command may take; default as long as it needs"""

    @classmethod
    def of(cls, goal: Goal, *, model: str, task: Any, output: Path, minutes: float | None = None, **more: Any):
        """Checks the options.

        Args:
            goal: from `Goal.of`.
            model: folder or hub id, or the name of a model that comes with the library.
            task: as an evaluation file has it: the name of a task, or a mapping with `file`.
            output: folder of the measurements and of `tuned.yaml`.
            minutes: how long the command may take; None: as long as it needs.
            more: further fields of `EvalConfig`; None leaves the default.

        Raises:
            ConfigError: names every option that is wrong.
        """
        if minutes is not None and minutes <= 0:
            raise ConfigError(f"--time {minutes:g}: expected minutes, more than 0")
        given = {key: value for key, value in more.items() if value is not None}
        fixed = {"model": model, "task": task, "output": output, "keep_ratios": (0.5,), "baselines": ("full",)}
        try:
            return cls(goal, EvalConfig.model_validate(fixed | given), minutes)
        except ValidationError as error:
            problems = [
                f"--{str(item['loc'][0]).replace('_', '-')}: {item['msg'].removeprefix('Value error, ')}"
                for item in error.errors(include_url=False)
            ]
            raise ConfigError("\n".join(problems)) from error
