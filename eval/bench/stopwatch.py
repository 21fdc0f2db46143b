# SPDX-License-Identifier: Apache-2.0
"""Seconds and bytes: CUDA events and the allocator's counters on a GPU, the clock and torch's profiler on a CPU."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")

CPU = torch.device("cpu")


def timed(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Seconds until `work` and everything that it started on the device have ended, and the result of `work`."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        result = work()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3, result
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def peak_bytes(work: Callable[[], object], device: torch.device = CPU) -> int:
    """The largest memory of torch's tensors during `work`, in bytes, less the memory before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports to stderr that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event["args"] for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    before = changes[0]["Total Allocated"] - changes[0]["Bytes"]
    return max(change["Total Allocated"] for change in changes) - before


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The bounds of the middle half of the measurements."""
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    def to_dict(self) -> dict:
        """Everything as plain JSON values."""
        low, high = self.quartiles
        return {"median": self.median, "low": low, "high": high, "samples": list(self.samples)}


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """theirs / ours, round by round. Both were measured close in time, so that a drift of the machine cancels."""
    return Spread(tuple(b / a for a, b in zip(ours, theirs, strict=True)))
