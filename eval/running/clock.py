# SPDX-License-Identifier: Apache-2.0
"""Measures how long a model takes to answer, and how much of that passes before its first token."""

from __future__ import annotations

import time
from typing import Any, Self

import torch

from vtprune.eval.results.timings import Spent


def now(device: torch.device) -> float:
    """Seconds of a clock, read when the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """A context manager that times what a model answers inside it, from its calls.

    The first call of the model is the prefill, with the vision encoder and the selection of tokens. What is done behind
    the last call, such as scoring, does not count.
    """

    def __init__(self, model: Any):
        self._model = model
        self._ends: list[float] = []

    def __enter__(self) -> Self:
        self._handle = self._model.register_forward_hook(self._called)
        self._started = now(self._model.device)
        return self

    def _called(self, _module: Any, _inputs: Any, output: Any) -> None:
        self._ends.append(now(output.logits.device))

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    @property
    def spent(self) -> Spent:
        """Seconds from the start to the end of the last call, and to that of the first one."""
        return Spent(self._ends[-1] - self._started, self._ends[0] - self._started)
