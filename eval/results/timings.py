# SPDX-License-Identifier: Apache-2.0
"""Wall times of batches, from the `timings.jsonl` that runs leave. They never repeat, unlike results."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import median

from vtprune.eval.results.records import json_lines

Batches = list[tuple[float, int]]
"""(wall seconds, number of examples) of each batch."""


def cell_batches(folders: Iterable[Path]) -> dict[str, Batches]:
    """Name of a cell -> its batches. If a batch ran twice, the last time counts."""
    found: dict[str, dict[int, tuple[float, int]]] = {}
    for line in (line for folder in folders for line in json_lines(folder / "timings.jsonl")):
        found.setdefault(line["cell"], {})[line["first"]] = line["seconds"], line["examples"]
    return {cell: list(batches.values()) for cell, batches in found.items()}


def seconds_per_example(folders: Iterable[Path]) -> dict[str, float]:
    """Name of a cell -> mean wall seconds of an example."""
    return {
        cell: sum(seconds for seconds, _ in batches) / sum(examples for _, examples in batches)
        for cell, batches in cell_batches(folders).items()
    }


def examples_per_second(folders: Iterable[Path]) -> dict[str, float]:
    """Name of a cell -> examples in a second, the median of its batches."""
    return {
        cell: median(examples / seconds for seconds, examples in batches)
        for cell, batches in cell_batches(folders).items()
    }
