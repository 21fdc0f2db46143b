# SPDX-License-Identifier: Apache-2.0
"""The files that a run leaves, and how an interrupted run goes on.

    OUTPUT/cells/<name>-<key>.jsonl.gz          a finished cell, one line for each example, in their order
    OUTPUT/cells/<name>-<key>.<process>.batches a process's or shard's part of an unfinished cell, batch by batch
    OUTPUT/plan.json                            the cells that the run will have, written when it begins
    OUTPUT/timings.jsonl                        wall seconds of every batch; kept apart, because they never repeat
    OUTPUT/timings.<shard>.jsonl                those of a shard, until a run without shards puts them into the file
    OUTPUT/results.jsonl                        one line for each cell, in the order of the configuration

The key in a cell's file name is a hash of everything that determines its numbers, so files of another configuration in
the same folder are never mixed in. Every batch is one gzip member, whose checksum shows whether it is torn or damaged.
`results.jsonl` is computed from the cells' files only. The finished files are the same, byte for byte, however often a
run was killed and however many processes it had.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from vtprune.errors import VTPruneError
from vtprune.eval.results.status import Refusal

Record = dict[str, Any]

_SUFFIX = ".jsonl.gz"
_PART_SUFFIX = ".batches"


def to_line(record: Record) -> bytes:
    """One JSON line. Keys keep their order, and numbers keep their full precision."""
    return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError into a VTPruneError that says what could not be written and what to do."""
    try:
        yield
    except OSError as error:
        raise VTPruneError(
            f"{path}: cannot be written: {error.strerror}; what is finished is kept, "
            "and the same command goes on from there"
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that readers see the old or the new one, never a part. Raises VTPruneError, e.g. disk full."""
    # Shards may write the same file at the same time, each under another name.
    part = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    with writing(path):
        try:
            part.write_bytes(content)
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise


def append(path: Path, content: bytes) -> None:
    """Adds to a file in one write. Raises VTPruneError, e.g. if the disk is full; the file may then end in a part."""
    # The file is opened, written and closed each time. So if the process dies, at most this write is torn.
    with writing(path), path.open("ab") as file:
        file.write(content)


class CellFile:
    """The records of one cell: `{"index": i, ...}` for i = 0, 1, ..., or a single `{"status": ...}` that ends the cell.

    The constructor reads what earlier runs left, but only whole batches. The last bits of an example's numbers may
    depend on the padding of its batch, so a batch runs again as a whole.

    Args:
        path: the file of the finished cell; its folder is made if it is missing.
        batches: the examples' indices, batch by batch, the same on every start.
        shared: whether others add to the cell now. If nobody does, what is there is put into one file.
    """

    def __init__(self, path: Path, batches: Sequence[range], *, shared: bool = False):
        self.path = path
        self.batches = batches
        self.ending: Record | None = None
        self._done: dict[range, list[Record]] = {}
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        # The finished file last: whoever finishes the cell meanwhile removes the parts after it is there.
        for file in (*part_paths(self.path), self.path):
            for records in members(file):
                self._take(records)
        if self.complete:
            self.finish()
        elif not shared:
            self._gather_up()

    @property
    def name(self) -> str:
        """The cell's name in `results.jsonl`."""
        return cell_name(self.path)

    @property
    def records(self) -> list[Record]:
        """The records that are there, in the order of the examples."""
        return [record for batch in self._in_order() for record in self._done[batch]]

    @property
    def complete(self) -> bool:
        """Whether all batches are done, or the cell has ended without scores."""
        return self.ending is not None or len(self._done) == len(self.batches)

    @property
    def remaining(self) -> list[range]:
        """The batches that still have to run."""
        return [] if self.complete else [batch for batch in self.batches if batch not in self._done]

    def finish(self, parts: Iterable[CellPart] = ()) -> None:
        """Writes the whole cell and removes its parts.

        Args:
            parts: what the processes of this run did since the file was opened. If one of them ended the cell, it has
                no scores.
        """
        for part in parts:
            for records in part.batches:
                self._take(records)
            self.ending = self.ending or part.ending
        if self.ending is None:
            content = b"".join(_packed(self._done[batch]) for batch in self._in_order())
        else:
            self._done.clear()
            content = _packed([self.ending])
        if not self.path.exists() or self.path.read_bytes() != content:
            write_atomically(self.path, content)
        self._remove(part_paths(self.path))

    def _take(self, records: list[Record]) -> None:
        if len(records) == 1 and "status" in records[0]:
            self.ending = records[0]
        indices = [record.get("index") for record in records]
        batch = next((batch for batch in self.batches if list(batch) == indices), None)
        if batch is not None:
            self._done.setdefault(batch, records)

    def _gather_up(self) -> None:
        """Writes all good batches to one file, so that a run appends behind a whole batch, never behind a torn one."""
        first = part_path(self.path, 0)
        stale = [file for file in (self.path, *part_paths(self.path)) if file.exists()]
        if self._done:
            write_atomically(first, b"".join(_packed(self._done[batch]) for batch in self._in_order()))
            stale = [file for file in stale if file != first]
        self._remove(stale)

    def _in_order(self) -> list[range]:
        return sorted(self._done, key=lambda batch: batch.start)

    def _remove(self, files: Iterable[Path]) -> None:
        with writing(self.path):
            for file in files:
                file.unlink(missing_ok=True)


class CellPart:
    """The batches that one process adds to an unfinished cell, written as soon as they are done.

    Args:
        path: the file of the finished cell.
        process: number of the process, or name of the shard.
    """

    def __init__(self, path: Path, process: int | str):
        self._path = part_path(path, process)
        self.timings = path.parent.parent / (
            f"timings.{process}.jsonl" if isinstance(process, str) else "timings.jsonl"
        )
        """where the wall seconds of its batches go"""
        self.name = cell_name(path)
        self.batches: list[list[Record]] = []
        self.ending: Record | None = None

    @property
    def examples(self) -> int:
        """Number of examples that are done."""
        return sum(map(len, self.batches))

    def append(self, records: list[Record]) -> None:
        """Adds the records of a batch."""
        append(self._path, _packed(records))
        self.batches.append(records)

    def end(self, refusal: Refusal) -> None:
        """Closes the cell without scores, e.g. because its budget is under the method's floor."""
        floor = {} if refusal.floor is None else {"floor": refusal.floor}
        self.ending = {"status": refusal.status, "reason": refusal.reason, **floor}


def part_path(path: Path, process: int | str) -> Path:
    """The file of a process's or a shard's part of the unfinished cell whose file will be `path`."""
    return path.with_name(f"{path.name.removesuffix(_SUFFIX)}.{process}{_PART_SUFFIX}")


def part_paths(path: Path) -> list[Path]:
    """The files of all parts of the unfinished cell whose file will be `path`."""
    return sorted(path.parent.glob(f"{path.name.removesuffix(_SUFFIX)}.*{_PART_SUFFIX}"))


def cut_off_torn(path: Path) -> None:
    """Removes what is behind the last whole batch of a part, so that its shard appends behind a whole one."""
    whole = b"".join(map(_packed, members(path)))
    if path.exists() and path.read_bytes() != whole:
        write_atomically(path, whole)


def _packed(records: Iterable[Record]) -> bytes:
    """One gzip member; the same records give the same bytes."""
    return gzip.compress(b"".join(map(to_line, records)), mtime=0)


def members(path: Path) -> Iterator[list[Record]]:
    """The records of each gzip member before the first torn or damaged one; none if there is no file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    while content:
        member = zlib.decompressobj(wbits=31)  # a gzip header, and its checksum at the end
        try:
            lines = member.decompress(content)
            records = [json.loads(line) for line in lines.splitlines()]
        except (zlib.error, ValueError):
            return
        if not member.eof:
            return
        yield records
        content = member.unused_data


def cell_path(output: Path, label: str, key: str) -> Path:
    """The file of a cell's records: its name is readable for people, and `key` makes it unique."""
    return named_path(output, f"{re.sub(r'[^A-Za-z0-9.]+', '-', label).strip('-')}-{key}")


def cell_name(path: Path) -> str:
    """The name in `results.jsonl` of the cell whose file is `path`."""
    return path.name.removesuffix(_SUFFIX)


def named_path(output: Path, cell: str) -> Path:
    """The file of a finished cell; `cell` is the name in its line of results."""
    return output / "cells" / f"{cell}{_SUFFIX}"


def read_results(path: str | Path) -> list[Record]:
    """The lines of a `results.jsonl`."""
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def json_lines(path: Path) -> list[Record]:
    """The whole lines of a file that runs append to; none if there is no file."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # the line is torn, because a run was killed
            continue
    return found


def cell_records(output: Path, cell: str) -> list[Record]:
    """The records of the examples of a finished cell, in their order; `cell` is the name in its line of results.

    Raises:
        OSError, ValueError: the file is missing, or it is damaged.
    """
    try:
        lines = gzip.decompress(named_path(output, cell).read_bytes()).splitlines()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(str(error)) from error
    return [record for line in lines if "index" in (record := json.loads(line))]
