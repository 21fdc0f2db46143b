# SPDX-License-Identifier: Apache-2.0
"""The evaluation file: models, tasks, methods and budgets. It is checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from vtprune.config import ConfigModel, YamlFile, key_error, load_method_file, nearest, validate
from vtprune.errors import ConfigError, VTPruneError
from vtprune.eval.presets import find
from vtprune.eval.tasks import FileTask, check_task_name, name_of
from vtprune.methods import AUTO, build_method, build_methods, list_methods

Baseline = Literal["full", "zero", "downsample"]
BASELINES: tuple[str, ...] = get_args(Baseline)
KeepRatio = Annotated[float, Field(gt=0, lt=1)]

_ENTRY_KEYS = ("name", "preset", "seeds", "keep_ratios", "keep_tokens", "grid")
BUDGETS = ("keep_ratio", "keep_tokens")
"""Fields of every method that a row gives as lists."""

LISTS = {"keep_ratio": "keep_ratios", "keep_tokens": "keep_tokens", "seed": "seeds"}
"""Field of a method -> the key of a row that lists its values. The list may also stand in `grid`."""


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str | dict | FileTask) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]
"""One name, or a list of them."""

TaskEntry = Annotated[
    Annotated[FileTask, Tag("file with own data")] | Annotated[str, Tag("name of a task")],
    Discriminator(lambda value: "file with own data" if isinstance(value, dict | FileTask) else "name of a task"),
]
Tasks = Annotated[tuple[TaskEntry, ...], BeforeValidator(_listed), Field(min_length=1)]
"""One name of a task or one file, or a list of them."""


class MethodEntry(ConfigModel):
    """A row of the comparison, or a grid of rows: a method, its parameters, its budgets, and its seeds."""

    name: str
    params: dict[str, Any] = {}
    """parameters other than the budget and the seed, as written"""
    grid: dict[str, tuple[Any, ...]] = {}
    """parameter -> its values; one row for each combination. Budgets and seeds may stand here or in the keys below"""
    seeds: tuple[int, ...] = ()
    """one cell each; only for methods with a `seed`"""
    keep_ratios: tuple[KeepRatio, ...] | None = None
    """budgets of this row; default: those of the file; if empty, the method's own schedule holds"""
    keep_tokens: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """budgets of this row as counts per crop, instead of ratios"""
    preset: str | None = None
    """the published setting that all of this comes from"""

    @model_validator(mode="after")
    def _buildable(self) -> MethodEntry:
        known = list_methods()
        if self.name in BASELINES:
            raise key_error("name", f"{self.name} is a baseline, list it under 'baselines'")
        if self.name == AUTO:
            raise key_error("name", "'auto' depends on the model; name a method: see `vtprune methods --model MODEL`")
        if self.name not in known:
            raise key_error("name", f"unknown method {self.name!r}; {nearest(self.name, known)}")
        fields = [field.name for field in dataclasses.fields(known[self.name]) if field.name not in BUDGETS]
        for key in (*self.params, *self.grid):
            if key in BUDGETS:
                raise key_error(key, "not as a single value: rows list budgets, see 'keep_ratios' and 'keep_tokens'")
            if key not in fields:
                raise key_error(key, f"unknown key; {nearest(key, [*fields, *_ENTRY_KEYS])}")
            if key in self.params and key in self.grid:
                raise key_error(key, "given twice, by itself and in 'grid'")
        for key, values in self.grid.items():
            if not values or len(set(map(str, values))) < len(values):
                raise key_error("grid", f"expected different values of {key}, got {list(values)}")
        self._check_seeds(fields)
        if self.keep_ratios is not None and self.keep_tokens is not None:
            raise key_error("keep_tokens", "give 'keep_ratios' or 'keep_tokens', not both")
        if self.keep_ratios == () and known[self.name].needs_budget:
            raise key_error("keep_ratios", f"{self.name} has no schedule of its own, it needs a budget")
        if self.keep_tokens == ():
            raise key_error("keep_tokens", "expected at least one count")
        for params in self.rows():
            try:
                build_method({"name": self.name, **params})
            except VTPruneError as error:
                raise ValueError(str(error)) from error
        return self

    def _check_seeds(self, fields: list[str]) -> None:
        if self.seeds and "seed" not in fields:
            raise key_error("seeds", f"{self.name} has no randomness to seed")
        if self.seeds and "seed" in self.params:
            raise key_error("seeds", "give 'seed' or 'seeds', not both")
        if len(set(self.seeds)) < len(self.seeds):
            raise key_error("seeds", f"a seed is given twice: {list(self.seeds)}")

    def rows(self) -> list[dict[str, Any]]:
        """The parameters of each row. The last parameter of the grid changes fastest."""
        combinations = product(*self.grid.values())
        return [{**self.params, **dict(zip(self.grid, values, strict=True))} for values in combinations]


def _entry(value: Any) -> Any:
    """A bare name, or a flat mapping whose unreserved keys are the method's parameters."""
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict):
        return value
    if "preset" in value:
        for key in value:
            if key not in ("preset", "seeds"):
                raise key_error(str(key), "does not go with 'preset', which says it all")
        try:
            value = {**value, **find(value["preset"]).row(value["preset"].split("/")[0])}
        except VTPruneError as error:
            raise key_error("preset", str(error)) from error
    known = {key: value[key] for key in _ENTRY_KEYS if key in value}
    if isinstance(known.get("grid"), dict):
        known["grid"] = dict(known["grid"])
        for field in known["grid"].keys() & LISTS.keys():
            if LISTS[field] in known:
                raise key_error("grid", f"{field} is given twice, here and as {LISTS[field]!r}")
            known[LISTS[field]] = known["grid"].pop(field)
    return {**known, "params": {key: item for key, item in value.items() if key not in _ENTRY_KEYS}}


class ComposedEntry(ConfigModel):
    """A row with several methods in one session: a list of names and mappings, as `vtprune.prune` takes it.

    Each part has a budget of its own, or its own schedule. A ratio counts the tokens that reach the method.
    """

    parts: tuple[dict[str, Any], ...]

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, parts: Any) -> Any:
        return {"parts": [{"name": part} if isinstance(part, str) else part for part in parts]}

    @model_validator(mode="after")
    def _buildable(self) -> ComposedEntry:
        if len(self.parts) < 2:
            raise ValueError("expected at least two methods in a list; a single one needs no list")
        try:
            build_methods(self.parts)
        except VTPruneError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def keep_ratio(self) -> float | None:
        """What all parts together are asked to keep; None if one of them has another budget than a ratio."""
        asked = [part.get("keep_ratio") for part in self.parts]
        return None if None in asked else round(prod(asked), 4)


def _with_files(rows: Any) -> Any:
    """Rows `{file: tuned.yaml}` replaced by the method, or the methods, of that file, each with its budget."""
    if not isinstance(rows, list | tuple):
        return rows
    return [
        _of_file(row, f"{place}.") if isinstance(row, dict) and "file" in row else row for place, row in enumerate(rows)
    ]


def _of_file(row: dict[str, Any], where: str) -> Any:
    for key in row:
        if key != "file":
            raise key_error(f"{where}{key}", "does not go with 'file', which says it all")
    if not isinstance(row["file"], str | Path):
        raise key_error(f"{where}file", f"expected the path of a YAML file with a method, got {row['file']!r}")
    try:
        found = load_method_file(row["file"])
    except ConfigError as error:
        raise key_error(f"{where}file", str(error)) from error
    if isinstance(found, list):
        return found
    budgets = {LISTS[key]: [found[key]] for key in BUDGETS if key in found}
    return {key: value for key, value in found.items() if key not in BUDGETS} | (budgets or {"keep_ratios": []})


def _kind_of_row(value: Any) -> str:
    return "composed" if isinstance(value, list | ComposedEntry) else "single"


Row = Annotated[
    Annotated[MethodEntry, BeforeValidator(_entry), Tag("single")] | Annotated[ComposedEntry, Tag("composed")],
    Discriminator(_kind_of_row),
]


class EvalConfig(ConfigModel):
    """The settings of `vtprune eval`. Each method at each budget on each model and task is one cell of the result."""

    model: Names
    """folders or hub ids of models; `digitscenes`, `digitscenes_video` and `digitscenes_clip` come with the library"""
    task: Tasks = ("digitscenes",)
    """names of tasks, and files with own data; all of them ask questions, or all of them have classes for a CLIP"""
    limit: int | None = Field(default=None, ge=1)
    """number of examples, the first ones of the task; default all"""
    output: Path
    """folder of the results, made if it is missing; default `results/<name of the file>`"""
    batch_size: int = Field(default=16, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """attention back end, the same for every row"""
    device: str = Field(default="cpu", pattern=r"^(cpu|mps|cuda(:\d+)?)$")
    max_new_tokens: int | None = Field(default=None, ge=1)
    """default: enough for the task's answers; not for tasks of classes"""
    keep_ratios: tuple[KeepRatio, ...] = Field(min_length=1)
    baselines: tuple[Baseline, ...] = BASELINES
    """tasks of classes have "full" only, and the file has to say so"""
    methods: Annotated[tuple[Row, ...], BeforeValidator(_with_files)] = ()

    @field_validator("model")
    @classmethod
    def _no_missing_folder(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        # What looks like a path must exist. Anything else may be a hub id, which only the hub knows.
        for model in models:
            if model.startswith(("/", ".", "~")) and not Path(model).expanduser().is_dir():
                raise ValueError("expected a folder that exists")
        return models

    @field_validator("task")
    @classmethod
    def _known_tasks(cls, tasks: tuple[TaskEntry, ...]) -> tuple[TaskEntry, ...]:
        for task in tasks:
            if isinstance(task, str):
                try:
                    check_task_name(task)
                except ConfigError as error:
                    raise ValueError(str(error)) from error
        return tasks

    @field_validator("model", "task")
    @classmethod
    def _once(cls, entries: tuple[TaskEntry, ...]) -> tuple[TaskEntry, ...]:
        names = list(map(name_of, entries))
        if len(set(names)) < len(names):
            raise ValueError("expected each name once; files with own data take a 'name'")
        return entries

    @field_validator("baselines")
    @classmethod
    def _full_is_measured(cls, baselines: tuple[str, ...]) -> tuple[str, ...]:
        if "full" not in baselines:
            raise ValueError("expected 'full' among them, retention is measured against it")
        return tuple(name for name in BASELINES if name in baselines)

    def resolved(self, model: str, task: Any) -> dict[str, Any]:
        """The configuration of one model on one task as JSON: all that determines numbers, so no output folder.

        task: name or entry of the task, in JSON types.
        """
        return self.model_dump(mode="json", exclude={"output"}) | {"model": model, "task": task}


def find_config(name: str | Path) -> Path:
    """The file of that name, else the one that comes with the package: `quickstart` is `configs/quickstart.yaml`.

    Raises:
        ConfigError: there is no file of that name, it has no suffix, and no such file comes with the package.
    """
    path = Path(name)
    if path.is_file() or path.suffix:
        return path
    shipped = {file.stem: file for file in (Path(__file__).parent / "configs").glob("*.yaml")}
    if str(name) not in shipped:
        raise ConfigError(f"{name}: no such file, and none that comes with vtprune; {nearest(str(name), shipped)}")
    return shipped[str(name)]


def load_config(path: str | Path, changes: Mapping[str, Any] | None = None, **overrides: Any) -> EvalConfig:
    """Reads and checks an evaluation file.

    Args:
        path: YAML file with the fields of `EvalConfig`, or the name of one that comes with the package.
        changes: dotted path into the file -> value, e.g. `{"methods.0.layer": 2}`.
        overrides: fields that replace those of the file; None leaves the file's value.

    Raises:
        ConfigError: names the file, the line, the key and what was expected.
    """
    file = YamlFile(find_config(path))
    if not isinstance(file.data, dict):
        got = type(file.data).__name__
        raise file.error((), f"expected a mapping with {', '.join(EvalConfig.model_fields)}, got {got}")
    file.data.setdefault("output", f"results/{file.path.stem}")
    entries = _listed(file.data.get("task"))
    for entry in entries if isinstance(entries, list) else ():
        place_beside(file, entry, ("file", "media"))
    for row in rows if isinstance(rows := file.data.get("methods"), list) else ():
        place_beside(file, row, ("file",))
    for key, value in (changes or {}).items():
        _change(file, key, value)
    file.data.update({key: value for key, value in overrides.items() if value is not None})
    return validate(EvalConfig, file)


def place_beside(file: YamlFile, data: Any, keys: Sequence[str]) -> None:
    """Makes the paths that a mapping of a file has under `keys` relative to the folder of the file."""
    for key in keys if isinstance(data, dict) else ():
        if isinstance(data.get(key), str):
            data[key] = str(file.path.parent / Path(data[key]).expanduser())


def parse_changes(assignments: list[str]) -> dict[str, Any]:
    """`["limit=100", "methods.0.layers=[2, 4]"]` -> `{"limit": 100, "methods.0.layers": [2, 4]}`; values are YAML.

    Raises:
        ConfigError: no `=`, or not YAML.
    """
    changes = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {assignment}: expected KEY=VALUE, e.g. methods.0.layer=3")
        try:
            changes[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {assignment}: the value is not valid YAML") from error
    return changes


def _change(file: YamlFile, key: str, value: Any) -> None:
    """Sets one value of a parsed file.

    If a parameter of a bare method name is set, the name becomes a mapping. `task.file` replaces the name of a task.
    """
    *path, last = (int(part) if part.isdigit() else part for part in key.split("."))
    data, parent = file.data, None
    for depth, part in enumerate([*path, last]):
        if isinstance(data, str) and (isinstance(parent, list) or part == "file") and part != "name":
            data = parent[path[depth - 1]] = {} if path[0] == "task" and part == "file" else {"name": data}
        fits = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if not fits and not isinstance(data, dict):
            size = f" (a list of {len(data)})" if isinstance(data, list) else ""
            where = ".".join(map(str, path[:depth]))
            raise file.error(path[:depth], f"--set {key}: there is no {part!r} in {where}{size}")
        if depth == len(path):
            data[part] = value
        else:
            if isinstance(data, dict):
                data.setdefault(part, {})
            data, parent = data[part], data
