# SPDX-License-Identifier: Apache-2.0
"""Wall times of batches, in the `timings.jsonl` that runs leave. They never repeat, unlike results."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from vtprune.eval.results.records import Record, json_lines


@dataclass(frozen=True)
class Spent:
    """Wall seconds of a batch. What the processor makes of media and text is not in them."""

    seconds: float
    """until the last answer"""
    prefill: float | None = None
    """until the first forward call has ended: encoder, selection and prefill; None where nothing is generated"""

    def to_dict(self) -> Record:
        """The fields of a line of `timings.jsonl`."""
        prefill = {} if self.prefill is None else {"prefill_seconds": round(self.prefill, 6)}
        return {"seconds": round(self.seconds, 6)} | prefill


@dataclass(frozen=True)
class Latency:
    """Wall seconds of one example at the batch size of the run: the median over the batches of a cell."""

    whole: float
    """until the answer has ended"""
    prefill: float | None
    """until the first token; None where nothing is generated, and for runs of versions that did not measure it"""

    @property
    def per_second(self) -> float:
        """Examples in a second."""
        return 1 / self.whole


def latencies(folders: Iterable[Path]) -> dict[str, Latency]:
    """Name of a cell -> its latency. If a batch ran twice, the last time counts."""
    found: dict[str, dict[int, Record]] = {}
    for line in (line for folder in folders for line in json_lines(Path(folder) / "timings.jsonl")):
        found.setdefault(line["cell"], {})[line["first"]] = line
    return {cell: _latency(list(batches.values())) for cell, batches in found.items()}


def _latency(batches: list[Record]) -> Latency:
    def each(key: str) -> float:
        return median(batch[key] / batch["examples"] for batch in batches)

    measured = all("prefill_seconds" in batch for batch in batches)
    return Latency(each("seconds"), each("prefill_seconds") if measured else None)
