# SPDX-License-Identifier: Apache-2.0
"""Measures how long a model takes to answer, and how much of that passes before its first token."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from vtprune.eval.results.timings import Spent

Result = TypeVar("Result")


def now(device: torch.device) -> float:
    """Seconds of a clock, read when the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def timed_answers(model: Any, work: Callable[[], Result]) -> tuple[Result, Spent]:
    """The result of `work`, which calls `model.generate`, and what it took.

    The first forward call of `generate` is the prefill, with the vision encoder and the selection of tokens.
    """
    ended: list[float] = []

    def first_call_ended(_module: Any, _inputs: Any, output: Any) -> None:
        if not ended:
            ended.append(now(output.logits.device))

    handle = model.register_forward_hook(first_call_ended)
    try:
        started = now(model.device)
        result = work()
        return result, Spent(now(model.device) - started, ended[0] - started)
    finally:
        handle.remove()
