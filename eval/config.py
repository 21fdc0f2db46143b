# SPDX-License-Identifier: Apache-2.0
"""The evaluation file: a model, a task, methods and budgets, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from vtprune.config import ConfigModel, YamlFile, key_error, nearest, validate
from vtprune.errors import VTPruneError
from vtprune.eval.tasks import TASKS
from vtprune.methods import build_method, list_methods

Baseline = Literal["full", "zero", "downsample"]
BASELINES: tuple[str, ...] = get_args(Baseline)
KeepRatio = Annotated[float, Field(gt=0, lt=1)]

_ENTRY_KEYS = ("name", "seeds", "keep_ratios")
BUDGETS = ("keep_ratio", "keep_tokens")
"""fields of every method that the grid sets"""


class MethodEntry(ConfigModel):
    """One row of the comparison: a method, its parameters, and the seeds to repeat it with."""

    name: str
    params: dict[str, Any] = {}
    """parameters other than the budget and the seed, as written"""
    seeds: tuple[int, ...] = ()
    """one cell each; only for methods with a `seed`"""
    keep_ratios: tuple[KeepRatio, ...] | None = None
    """budgets of this row; default: those of the file"""

    @model_validator(mode="after")
    def _buildable(self) -> MethodEntry:
        known = list_methods()
        if self.name in BASELINES:
            raise key_error("name", f"{self.name} is a baseline, list it under 'baselines'")
        if self.name not in known:
            raise key_error("name", f"unknown method {self.name!r}; {nearest(self.name, known)}")
        fields = [field.name for field in dataclasses.fields(known[self.name]) if field.name not in BUDGETS]
        for key in self.params:
            if key in BUDGETS:
                raise key_error(key, "does not belong to a row: the grid gives the budget, see 'keep_ratios'")
            if key not in fields:
                raise key_error(key, f"unknown key; {nearest(key, [*fields, *_ENTRY_KEYS])}")
        if self.seeds and "seed" not in fields:
            raise key_error("seeds", f"{self.name} has no randomness to seed")
        if self.seeds and "seed" in self.params:
            raise key_error("seeds", "give 'seed' or 'seeds', not both")
        if len(set(self.seeds)) < len(self.seeds):
            raise key_error("seeds", f"a seed is given twice: {list(self.seeds)}")
        try:
            build_method({"name": self.name, **self.params})
        except VTPruneError as error:
            raise ValueError(str(error)) from error
        return self


def _entry(value: Any) -> Any:
    """A bare name, or a flat mapping whose unreserved keys are the method's parameters."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict):
        known = {key: value[key] for key in _ENTRY_KEYS if key in value}
        return {**known, "params": {key: item for key, item in value.items() if key not in _ENTRY_KEYS}}
    return value


class EvalConfig(ConfigModel):
    """What `vtprune eval` runs. Ratios, limits and seeds span a grid; each point of it is one cell of the result."""

    model: str
    """folder or hub id of a model; `digitscenes` and `digitscenes_video` come with the library"""
    task: str = "digitscenes"
    limit: int | None = Field(default=None, ge=1)
    """first examples of the task only; default all"""
    output: Path
    """folder that the results go to, made when missing; default `results/<name of the file>`"""
    batch_size: int = Field(default=16, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """attention back end, the same for every row"""
    device: str = Field(default="cpu", pattern=r"^(cpu|mps|cuda(:\d+)?)$")
    max_new_tokens: int | None = Field(default=None, ge=1)
    """default: what the task's answers need"""
    keep_ratios: tuple[KeepRatio, ...] = Field(min_length=1)
    baselines: tuple[Baseline, ...] = BASELINES
    methods: tuple[Annotated[MethodEntry, BeforeValidator(_entry)], ...] = ()

    @field_validator("model")
    @classmethod
    def _no_missing_folder(cls, model: str) -> str:
        # Anything that looks like a path must exist; what else it could be (a hub id) only the hub knows.
        if model.startswith(("/", ".", "~")) and not Path(model).expanduser().is_dir():
            raise ValueError("expected a folder that exists")
        return model

    @field_validator("task")
    @classmethod
    def _known_task(cls, task: str) -> str:
        if task not in TASKS:
            raise ValueError(f"expected the name of a task ({nearest(task, TASKS)})")
        return task

    @field_validator("baselines")
    @classmethod
    def _full_is_measured(cls, baselines: tuple[str, ...]) -> tuple[str, ...]:
        if "full" not in baselines:
            raise ValueError("expected 'full' among them, retention is measured against it")
        return tuple(name for name in BASELINES if name in baselines)

    def resolved(self) -> dict[str, Any]:
        """The configuration as JSON, without the output folder: what determines the numbers, not where they lie."""
        return self.model_dump(mode="json", exclude={"output"})


def load_config(path: str | Path, **overrides: Any) -> EvalConfig:
    """Reads and checks an evaluation file.

    Args:
        path: YAML file with the fields of `EvalConfig`.
        overrides: fields that replace those of the file; None leaves the file's value.

    Raises:
        ConfigError: names the file, the line, the key and what was expected.
    """
    file = YamlFile(path)
    if not isinstance(file.data, dict):
        got = type(file.data).__name__
        raise file.error((), f"expected a mapping with {', '.join(EvalConfig.model_fields)}, got {got}")
    file.data.setdefault("output", f"results/{file.path.stem}")
    file.data.update({key: value for key, value in overrides.items() if value is not None})
    return validate(EvalConfig, file)
