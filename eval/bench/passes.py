# SPDX-License-Identifier: Apache-2.0
"""One pass of a row through the model, which either measures its time or counts its memory."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vtprune.eval.bench.config import BenchConfig
from vtprune.eval.bench.path import (
    cache_bytes,
    compiled_decode,
    decode,
    encode,
    graphs_compiled,
    grow,
    prefill,
    prefill_text,
    static_cache,
)
from vtprune.eval.bench.rows import Row
from vtprune.eval.bench.stopwatch import peak_bytes, timed
from vtprune.report import Report

Inputs = Mapping[str, Tensor]

WARM_UP = 3
"""Compiled steps that are not timed: the first is compiled, on a GPU the second and third are recorded."""


@dataclass(frozen=True)
class Pass:
    """Seconds of one pass of a row."""

    encoder: float
    selector: float
    prefill: float
    """language model to the first token, selection included"""
    steps: Mapping[int, tuple[float, ...]]
    """number of answered tokens -> seconds of the decoding steps that were timed there"""
    graphs: int = 0
    """into which the steps were compiled; 0: they were not"""

    @property
    def first_token(self) -> float:
        return self.encoder + self.prefill

    def answer(self, tokens: int) -> float:
        """Seconds until the last of `tokens` tokens. Steps between the measured lengths are interpolated."""
        points = [(length, median(seconds)) for length, seconds in self.steps.items()]
        return self.first_token + sum(interpolated(points, length) for length in range(1, tokens))


def interpolated(points: Sequence[tuple[int, float]], at: int) -> float:
    """The value at `at`, linear between its neighbours among the (place, value) pairs, which ascend.

    Beyond the ends it is the value of the nearest pair.
    """
    if at <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if at <= right:
            return low + (high - low) * (at - left) / (right - left)
    return points[-1][1]


def empty_cache(model: Any, inputs: Inputs, config: BenchConfig) -> Any:
    """A static cache for the longest answer; None for a cache that grows."""
    if config.cache == "dynamic":
        return None
    steps = WARM_UP + config.steps * len(config.output_tokens)
    return static_cache(model, inputs["input_ids"].shape[1] + max(config.output_tokens) + steps)


@torch.inference_mode()
def one_pass(model: Any, inputs: Inputs, row: Row, config: BenchConfig) -> Pass:
    """Encode, prefill, and a few decoding steps at each length."""
    device = model.device
    gc.collect()  # here, so that it does not run while something is timed
    alone = _clock_waits(device)
    selector = selection_alone(model, inputs, row) if alone else 0.0
    with row.session(model, profile=not alone) as session:
        cache = empty_cache(model, inputs, config)
        encoder, encoded = timed(lambda: encode(model, inputs), device)
        seconds, (ids, cache) = timed(lambda: prefill(model, inputs, encoded, cache), device)
        if session is not None and not alone:
            selector = session.report.timings.selector
        step = decode
        if config.compile:
            step = compiled_decode(model, device)
            for _ in range(WARM_UP):
                ids = step(model, ids, cache)
        steps: dict[int, tuple[float, ...]] = {}
        answered = 1
        for length in config.output_tokens:
            if length > answered:
                grow(model, ids, cache, length - answered)
                answered = length
            timings = []
            for _ in range(config.steps):
                spent, ids = timed(lambda ids=ids: step(model, ids, cache), device)
                timings.append(spent)
            answered += config.steps
            steps[length] = tuple(timings)
    return Pass(encoder, selector, seconds, steps, graphs_compiled() if config.compile else 0)


def _clock_waits(device: torch.device) -> bool:
    """Whether a session waits for the device before it reads the clock, so that measuring choices slows a pass down."""
    return device.type != "cpu"


@torch.inference_mode()
def selection_alone(model: Any, inputs: Inputs, row: Row) -> float:
    """Seconds of the choices of a prefill that is run for them; 0 for the full model."""
    with row.session(model) as session:
        if session is None:
            return 0.0
        prefill(model, inputs, encode(model, inputs))
        return session.report.timings.selector


@torch.inference_mode()
def plain_pass(model: Any, batch: int, length: int) -> float:
    """Seconds of a prefill of `length` text tokens, without any session."""
    ids = torch.full((batch, length), 3, device=model.device)
    return timed(lambda: prefill_text(model, ids), model.device)[0]


@dataclass(frozen=True)
class Holding:
    """Memory and computation of a row; the same in every pass."""

    peak_bytes: int
    """tensors during a whole pass, beyond weights and inputs"""
    kv_bytes: int
    """of the KV cache after the prefill"""
    auxiliary_bytes: int
    """of hidden states kept for tokens that may come back"""
    report: Report | None
    """with the FLOPs of choices; None for the full model"""

    @property
    def selection_flops(self) -> int:
        """Of choosing tokens until the first one is answered."""
        return 0 if self.report is None else self.report.selection_flops


@torch.inference_mode()
def hold(model: Any, inputs: Inputs, row: Row, config: BenchConfig) -> Holding:
    """Counts in a pass that is not timed. The pass also warms the machine up."""
    found: dict[str, Any] = {}
    with row.session(model, profile="flops") as session:

        def work() -> None:
            encoded = encode(model, inputs)
            ids, cache = prefill(model, inputs, encoded, empty_cache(model, inputs, config))
            found.update(kv_bytes=cache_bytes(cache))
            decode(model, ids, cache)

        if model.device.type == "cuda":
            work()  # libraries set up their workspaces on first use
        peak = peak_bytes(work, model.device)
        report = None if session is None else session.report
    return Holding(peak, auxiliary_bytes=0 if report is None else report.auxiliary_bytes, report=report, **found)
