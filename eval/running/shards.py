# SPDX-License-Identifier: Apache-2.0
"""`vtprune eval --shard 3/8`: one of several commands that share a run by the files in its folder alone.

Every shard adds to files of its own. Which batches it runs depends only on the configuration, so shards need not know
of one another, and may start, stop and start again at any time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from vtprune.errors import ConfigError
from vtprune.eval.results.records import append, writing

_PATIENCE = 60.0
"""Seconds that a shard waits for others that start in the same moment."""


@dataclass(frozen=True)
class Shard:
    """The share of one command: every `count`-th batch of a run, beginning with batch `index` (from 1)."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From `3/8`. Raises ConfigError."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ConfigError(f"--shard {text}: expected INDEX/COUNT with an index from 1 to the count, e.g. 3/8")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def name(self) -> str:
        """For the names of its files."""
        return f"{self.index}of{self.count}"

    def takes(self, number: int) -> bool:
        """Whether the batch of this number, from 0 through all cells of a run, is one of its own."""
        return number % self.count == self.index - 1


def claim(output: Path, shard: Shard | None, stack: ExitStack) -> None:
    """Takes the folder of results until `stack` closes; makes it if it is missing.

    Shards may run side by side. A run that is none has the folder to itself.

    Raises:
        ConfigError: somebody else uses the folder.
        VTPruneError: the folder cannot be written.
    """
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        if shard is None:
            _take(output / ".lock", f"{output}: another evaluation is running in this folder", stack)
            for lock in _locks_of_shards(output):
                with ExitStack() as briefly:
                    _take(lock, f"{output}: shard {_name_in(lock)} is running in this folder", briefly)
                    lock.unlink()  # no shard can start meanwhile, because it would need `.lock`
            _tidy(output)
            return
        with ExitStack() as briefly:
            _take(output / ".lock", f"{output}: another evaluation is running in this folder", briefly, _PATIENCE)
            taken = f"{output}: shard {shard} is running in this folder already"
            _take(output / f".lock-{shard.name}", taken, stack)


def _take(path: Path, problem: str, stack: ExitStack, patience: float = 0.0) -> None:
    try:
        stack.enter_context(FileLock(path, timeout=patience))
    except Timeout as error:
        raise ConfigError(problem) from error


def _locks_of_shards(output: Path) -> Iterator[Path]:
    yield from sorted(output.glob(".lock-*of*"))


def _name_in(lock: Path) -> str:
    return lock.name.removeprefix(".lock-").replace("of", "/")


def _tidy(output: Path) -> None:
    """Puts the times that shards left into one file, and removes files that a killed run was writing."""
    for times in sorted(output.glob("timings.*.jsonl")):
        append(output / "timings.jsonl", times.read_bytes())
        times.unlink()
    for folder in (output, output / "cells", *output.glob("views/*")):
        for left in folder.glob(".*.part"):
            left.unlink()
