# SPDX-License-Identifier: Apache-2.0
"""What a run leaves on disk, and how an interrupted one is picked up again.

    OUTPUT/cells/<name>-<key>.jsonl   one line an example, appended batch by batch
    OUTPUT/timings.jsonl              wall seconds of every batch that was run, kept apart because they never repeat
    OUTPUT/results.jsonl              one line a cell, in the order of the configuration

The key in a cell's file name is a hash of everything that determines its numbers, so files of another configuration
in the same folder are never mixed in. `results.jsonl` is computed from the cells' files alone: however often a run
was killed, the finished file is the same, byte for byte.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def to_line(record: Record) -> bytes:
    """One JSON line; keys keep their order, numbers their full precision."""
    return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_atomically(path: Path, content: bytes) -> None:
    """Readers see the old file or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


class CellFile:
    """The records of one cell: `{"index": i, ...}` for i = 0, 1, ..., or a single `{"status": ...}` that ends the cell.

    Opening it drops what a killed run left unfinished: a torn last line, and examples of a batch that is not complete,
    because the batch is run again as a whole (an example's numbers may depend on its batch's padding in the last bits).

    Args:
        path: the file; made when missing, with its folder.
        batches: the examples' indices, batch by batch, the same on every start.
    """

    def __init__(self, path: Path, batches: Sequence[range]):
        self.path = path
        self.batches = batches
        self.records: list[Record] = []
        self.ending: Record | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._load()

    def _load(self) -> None:
        content = self.path.read_bytes() if self.path.exists() else b""
        lines = content.splitlines(keepends=True)
        for line in lines:
            record = _parse(line)
            if record is not None and "status" in record and not self.records:
                self.ending = record
                break
            if record is None or record.get("index") != len(self.records):
                break
            self.records.append(record)
        ends = [0, *(batch.stop for batch in self.batches)]
        complete = max(end for end in ends if end <= len(self.records))
        del self.records[complete:]
        good = sum(map(len, lines[: complete + (self.ending is not None)]))
        if good < len(content):
            with self.path.open("r+b") as file:
                file.truncate(good)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to run."""
        return self.ending is not None or len(self.records) == sum(map(len, self.batches))

    @property
    def remaining(self) -> list[range]:
        """The batches still to run."""
        return [] if self.complete else [batch for batch in self.batches if batch.start >= len(self.records)]

    def append(self, records: Sequence[Record]) -> None:
        """Adds the records of the next batch."""
        self._write(records)
        self.records.extend(records)

    def end(self, status: str, **details: Any) -> None:
        """Closes the cell without scores, e.g. because its budget lies under the method's floor."""
        self.ending = {"status": status, **details}
        self._write([self.ending])

    def _write(self, records: Sequence[Record]) -> None:
        # Opened, written and closed for each batch: when the process dies, at most the last batch is torn.
        with self.path.open("ab") as file:
            file.write(b"".join(map(to_line, records)))


def _parse(line: bytes) -> Record | None:
    """The record of a whole line, or None for a torn or corrupt one."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def cell_path(output: Path, label: str, key: str) -> Path:
    """Where a cell's records lie: readable for people, unique by `key`."""
    return output / "cells" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', label).strip('-')}-{key}.jsonl"


def read_results(path: str | Path) -> list[Record]:
    """The lines of a `results.jsonl`."""
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def cell_records(output: Path, cell: str) -> list[Record]:
    """The records of the examples of a finished cell, in their order; `cell` is what its line of results names."""
    lines = (output / "cells" / f"{cell}.jsonl").read_bytes().splitlines()
    return [record for line in lines if "index" in (record := json.loads(line))]
