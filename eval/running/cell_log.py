# SPDX-License-Identifier: Apache-2.0
"""Lines about cells for output that is no terminal, where a progress bar shows nothing until the end."""

from __future__ import annotations

import time
from statistics import mean

from rich.console import Console

from vtprune.eval.progress import say
from vtprune.eval.results.records import CellFile
from vtprune.eval.results.status import status_text


class CellLog:
    """A line when a cell begins, and one when it ends.

    Args:
        console: where the lines go. On a terminal, and without one, there are none.
        cells: number of cells of the run.
    """

    def __init__(self, console: Console | None, cells: int):
        self._console = None if console is None or console.is_terminal else console
        self._cells = cells
        self._begun, self._started = 0, 0.0

    def skip(self, cells: int = 1) -> None:
        """Counts cells that earlier runs, or others, have done."""
        self._begun += cells

    def begin(self, name: str, examples: int) -> None:
        """examples: number of them that this run, or shard, has to do."""
        self._begun += 1
        self._started = time.perf_counter()
        self._say(f"{name}: begins, {examples} examples")

    def end(self, name: str, examples: int, file: CellFile) -> None:
        """examples: number of those done. file: of the cell, as it is now."""
        seconds = time.perf_counter() - self._started
        if not file.complete:
            outcome = "other shards have the rest"
        elif file.ending is not None:
            outcome = status_text(file.ending["status"], file.ending.get("floor"))
        else:
            outcome = f"score {mean(record['score'] for record in file.records):.4g}"
        self._say(f"{name}: {examples} examples in {seconds:.1f} s, {outcome}")

    def _say(self, line: str) -> None:
        say(self._console, f"[{self._begun}/{self._cells}] {line}")
