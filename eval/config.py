# SPDX-License-Identifier: Apache-2.0
"""The evaluation file: models, tasks, methods and budgets. It is checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from vtprune.config import ConfigModel, YamlFile, key_error, nearest, validate
from vtprune.errors import ConfigError
from vtprune.eval.axes import AXES, Attention, Device, Dtype, OneOrSeveral, Positions, values_of
from vtprune.eval.method_rows import BASELINES, Baseline, KeepRatio, Rows
from vtprune.eval.tasks import FileTask, check_task_name, name_of


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str | Path | dict | FileTask) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]
"""One name, or a list of them."""

TaskEntry = Annotated[
    Annotated[FileTask, Tag("file with own data")] | Annotated[str, Tag("name of a task")],
    Discriminator(lambda value: "file with own data" if isinstance(value, dict | FileTask) else "name of a task"),
]
Tasks = Annotated[tuple[TaskEntry, ...], BeforeValidator(_listed), Field(min_length=1)]
"""One name of a task or one file, or a list of them."""


class EvalConfig(ConfigModel):
    """The settings of `vtprune eval`. Each method at each budget on each model and task is one cell of the result."""

    model: Names
    """folders or hub ids of models; `digitscenes`, `digitscenes_video` and `digitscenes_clip` come with the library"""
    task: Tasks = ("digitscenes",)
    """names of tasks, and files with own data; all of them ask questions, or all of them have classes for a CLIP"""
    include_path: Annotated[tuple[Path, ...], BeforeValidator(_listed)] = ()
    """folder or folders with further tasks of lmms-eval, relative to the folder of this file"""
    limit: int | None = Field(default=None, ge=1)
    """number of examples, the first ones of the task; default all"""
    output: Path
    """folder of the results, made if it is missing; default `results/<name of the file>`"""
    batch_size: int = Field(default=16, ge=1)
    dtype: OneOrSeveral[Dtype] = "float32"
    attention: OneOrSeveral[Attention] = "sdpa"
    """attention back end, the same for every row of a study"""
    device: OneOrSeveral[Device] = "auto"
    """`auto` is an accelerator if there is one, else the CPU"""
    device_map: Literal["auto"] | None = None
    """`auto` spreads the layers of a model over all accelerators, and over the CPU if these are too small"""
    positions: OneOrSeveral[Positions] | None = None
    """positions of the tokens that are left, for every row that does not set its own; default the method's own"""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """default: enough for the task's answers; not for tasks of classes"""
    keep_ratios: tuple[KeepRatio, ...] = Field(min_length=1)
    baselines: tuple[Baseline, ...] = BASELINES
    """tasks of classes have "full" only, and the file has to say so"""
    methods: Rows = ()

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

    @model_validator(mode="after")
    def _go_together(self) -> EvalConfig:
        if self.device_map is not None and self.device != "auto":
            raise key_error("device_map", "it takes all accelerators; leave 'device' out")
        if "flash_attention_2" in values_of(self.attention) and "float32" in values_of(self.dtype):
            raise key_error("attention", "flash_attention_2 computes in bfloat16 or float16, and dtype has float32")
        return self

    def combinations(self) -> list[tuple[dict[str, str], EvalConfig]]:
        """One for each combination of the axes: the values of the axes that have several, and the configuration in
        which every axis has that single value."""
        several = {name: getattr(self, name) for name in AXES if isinstance(getattr(self, name), tuple)}
        combined = [dict(zip(several, values, strict=True)) for values in product(*several.values())]
        return [(chosen, self.model_copy(update=chosen)) for chosen in combined]

    def resolved(self, model: str, task: Any) -> dict[str, Any]:
        """The configuration of one model on one task as JSON: all that determines numbers, so no output folder.

        task: name or entry of the task, in JSON types.
        """
        unused = set() if self.include_path else {"include_path"}
        return self.model_dump(mode="json", exclude={"output", *unused}) | {"model": model, "task": task}


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
    place_beside(file, file.data, ("include_path",))
    for key, value in (changes or {}).items():
        _change(file, key, value)
    file.data.update({key: value for key, value in overrides.items() if value is not None})
    return validate(EvalConfig, file)


def place_beside(file: YamlFile, data: Any, keys: Sequence[str]) -> None:
    """Makes the paths that a mapping of a file has under `keys`, or lists of paths, relative to the file's folder."""

    def placed(path: Any) -> Any:
        return str(file.path.parent / Path(path).expanduser()) if isinstance(path, str) else path

    for key in keys if isinstance(data, dict) else ():
        if isinstance(data.get(key), str | list):
            data[key] = list(map(placed, data[key])) if isinstance(data[key], list) else placed(data[key])


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
