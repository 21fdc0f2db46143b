# SPDX-License-Identifier: Apache-2.0
"""Opens what an evaluation file names under `task`: tasks of the library or of other packages, and files."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from vtprune.config import nearest
from vtprune.errors import ConfigError, VTPruneError
from vtprune.eval.tasks.base import AnyTask, Classification, Task
from vtprune.eval.tasks.builtin import TASKS
from vtprune.eval.tasks.file_task import FileTask
from vtprune.eval.tasks.suites import suite_tasks

GROUP = "vtprune.tasks"
"""Entry points of this group name functions without arguments that return a `Task` or a `Classification`."""

LMMS, SUITE = "lmms:", "suite:"
"""Stand before a name of lmms-eval (a task, a group or a tag), and before the name of a suite of its tasks."""

TaskEntry = str | FileTask
"""What stands under `task` in an evaluation file."""


def task_names() -> list[str]:
    """Names of the tasks of the library and of other packages. None of them is loaded."""
    return list(dict.fromkeys([*TASKS, *(entry.name for entry in entry_points(group=GROUP))]))


def check_task_name(name: str) -> None:
    """Raise ConfigError if no task or suite has that name. Nothing is loaded, lmms-eval's list of tasks neither."""
    if name.startswith(SUITE):
        suite_tasks(name.removeprefix(SUITE))
    elif name.startswith(LMMS):
        if name == LMMS:
            raise ConfigError(f"expected the name of a task of lmms-eval behind {LMMS}")
    elif name not in (known := task_names()):
        raise ConfigError(f"expected the name of a task ({nearest(name, known)})")


def name_of(entry: TaskEntry) -> str:
    """The name that tables and results have for an entry. Those of a group or a suite have the names of its tasks."""
    return entry.removeprefix(LMMS) if isinstance(entry, str) else entry.title


def open_tasks(entries: Iterable[TaskEntry | dict[str, Any]], include_path: Sequence[Path] = ()) -> dict[str, AnyTask]:
    """The tasks of a run, by name.

    Args:
        entries: of an evaluation file.
        include_path: folders with further tasks of lmms-eval.

    Raises:
        ConfigError: as `open_task` does, two entries have a task in common, or a folder is not there.
    """
    for folder in include_path:
        if not Path(folder).is_dir():
            raise ConfigError(f"include_path: {folder}: no such folder")
    found: dict[str, AnyTask] = {}
    for entry in entries:
        for task in _opened(entry, include_path):
            if task.name in found:
                raise ConfigError(f"task {task.name!r} is there twice, as {found[task.name].entry} and {task.entry}")
            found[task.name] = task
    return found


def open_task(entry: TaskEntry | dict[str, Any], include_path: Sequence[Path] = ()) -> AnyTask:
    """The task that an entry of an evaluation file names. It knows its name, its entry and its rules.

    Args:
        entry: a name, a `FileTask`, or the fields of one.
        include_path: folders with further tasks of lmms-eval.

    Raises:
        ConfigError: there is no such task, it cannot be loaded, it is a group, or the file has mistakes.
    """
    tasks = list(open_tasks([entry], include_path).values())
    if len(tasks) > 1:
        raise ConfigError(f"{entry} is a group of {len(tasks)} tasks; expected one")
    return tasks[0]


def _opened(entry: TaskEntry | dict[str, Any], include_path: Sequence[Path]) -> list[AnyTask]:
    if not isinstance(entry, str):
        return [FileTask.model_validate(entry).open()]
    check_task_name(entry)
    if entry.startswith((LMMS, SUITE)):
        from vtprune.eval.tasks.lmms_tasks import open_lmms

        names = suite_tasks(entry.removeprefix(SUITE)) if entry.startswith(SUITE) else [entry.removeprefix(LMMS)]
        return [task for name in names for task in open_lmms(name, include_path)]
    make, task = _made(entry)
    return [replace(task, name=entry, entry=entry, rules=source_hash(make))]


def _made(name: str) -> tuple[Callable[[], AnyTask], AnyTask]:
    """A task and the function that made it. Only the package that has it is imported, so no other can break this."""
    found = [entry for entry in entry_points(group=GROUP) if entry.name == name]
    packages = [_package(entry) for entry in found]
    if name in TASKS:
        packages.insert(0, "vtprune")
    if len(packages) > 1:
        raise ConfigError(f"task {name!r} is in several packages: {', '.join(packages)}; keep one of them installed")
    if name in TASKS:
        return TASKS[name], TASKS[name]()
    return _made_outside(found[0])


def _made_outside(entry: EntryPoint) -> tuple[Callable[[], AnyTask], AnyTask]:
    """The task of a plug-in. If its function raises or returns no task, the error names its package."""
    where = f"{_package(entry)}: its task {entry.name!r} ({entry.value}, group {GROUP})"
    try:
        make = entry.load()
        task = make()
    except VTPruneError:
        raise
    except Exception as error:
        raise ConfigError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(task, Task | Classification):
        raise ConfigError(f"{where} is no function that returns a Task or a Classification, but {type(task).__name__}")
    return make, task


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "an unknown package"


def source_hash(thing: Any) -> str:
    """Hash of the module of a method or a task, which may stand outside this library."""
    try:
        source = inspect.getsource(inspect.getmodule(thing))
    except (OSError, TypeError) as error:
        raise ConfigError(f"{thing!r} has no source file, so results could not be tied to its code") from error
    return hashlib.sha256(source.encode()).hexdigest()[:16]
