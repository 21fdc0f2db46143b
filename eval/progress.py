# SPDX-License-Identifier: Apache-2.0
"""What long commands show while they run: a progress bar, or lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressBar:
    """A label, a bar, the number of steps done, the time spent and the time that remains."""

    def __init__(self, progress: Progress, task: TaskID):
        self._progress = progress
        self._task = task

    def expect(self, total: int) -> None:
        """Sets the number of steps."""
        self._progress.update(self._task, total=total)

    def advance(self, label: str, steps: int = 1) -> None:
        """Shows what runs now, and that `steps` more steps are done."""
        self._progress.update(self._task, description=label, advance=steps)


def say(console: Console | None, line: str) -> None:
    """Prints one line, however narrow the console is; nothing without one."""
    if console is not None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(console: Console | None, label: str, total: int | None = None, done: int = 0) -> Iterator[ProgressBar]:
    """A bar that is shown while the context is open.

    Args:
        console: where the bar is shown; None shows none.
        label: what runs first.
        total: number of steps; None if it is not known yet.
        done: steps that earlier runs did.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console or Console(quiet=True)) as progress:
        yield ProgressBar(progress, progress.add_task(label, total=total, completed=done))
