# SPDX-License-Identifier: Apache-2.0
"""Measures: every row once a round, in an order drawn anew each time, so that drift of the machine hits all alike."""

from __future__ import annotations

import gc
import json
import platform
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

import vtprune
from vtprune import cost
from vtprune.errors import BudgetError, ConfigError, UnsupportedStageError
from vtprune.eval.bench.config import BenchConfig
from vtprune.eval.bench.linear import use_onednn
from vtprune.eval.bench.path import cache_bytes, decode, encode, grow, prefill, prefill_text
from vtprune.eval.bench.shapes import build_model, random_inputs, shape_of
from vtprune.eval.bench.stopwatch import Spread, paired, peak_bytes, timed
from vtprune.eval.progress import progress_bar
from vtprune.eval.results.records import Record, to_line, write_atomically
from vtprune.eval.results.status import OK, UNDER_FLOOR, Refusal
from vtprune.eval.running.cells import versions
from vtprune.methods import list_methods
from vtprune.report import Report

QUESTION = "What is shown in this image? Answer in one sentence."

Inputs = Mapping[str, Tensor]


@dataclass
class Row:
    """A line of the table: the full model, or a method at a budget."""

    label: str
    method: Mapping[str, Any] | None = None
    """what `vtprune.prune` takes; None for the full model"""
    keep_ratio: float | None = 1.0
    """as asked; None for the method's published schedule"""
    status: str = OK
    reason: str | None = None
    floor: float | None = None

    def session(self, model: Any) -> AbstractContextManager[vtprune.Session | None]:
        """What the row's passes run in. Raises BudgetError or UnsupportedStageError if the model cannot take it."""
        if self.method is None:
            return nullcontext()
        budget = {} if self.keep_ratio is None else {"keep_ratio": self.keep_ratio}
        return vtprune.prune(model, self.method, profile=True, **budget)

    def refused(self, error: BudgetError | UnsupportedStageError) -> None:
        """Notes why the row has no numbers. Raises `error` if it is a mistake in the configuration."""
        refusal = Refusal.of(error)
        self.status, self.reason, self.floor = refusal.status, refusal.reason, refusal.floor


def table_rows(config: BenchConfig, model: Any) -> list[Row]:
    """The full model, then every method at every budget; one that is under its floor also at its published schedule."""
    rows = [Row("full")]
    for entry in config.methods:
        spec = {"name": entry.name, **entry.params}
        budgets: list[float | None] = list(entry.keep_ratios or config.keep_ratios)
        for keep_ratio in budgets:
            row = Row(entry.label, spec, keep_ratio)
            try:
                row.session(model)
            except (BudgetError, UnsupportedStageError) as error:
                row.refused(error)
            rows.append(row)
            if row.status == UNDER_FLOOR and None not in budgets and not list_methods()[entry.name].needs_budget:
                budgets.append(None)
    return rows


# -- one pass ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """What one pass of a row took, in seconds."""

    encoder: float
    selector: float
    prefill: float
    """language model to the first token, selection included"""
    steps: Mapping[int, tuple[float, ...]]
    """Tokens answered so far -> the decoding steps timed there."""

    @property
    def first_token(self) -> float:
        return self.encoder + self.prefill

    def answer(self, tokens: int) -> float:
        """Until the last of so many tokens; steps between the measured lengths are interpolated."""
        points = [(length, median(seconds)) for length, seconds in self.steps.items()]
        return self.first_token + sum(_interpolated(points, length) for length in range(1, tokens))


def _interpolated(points: Sequence[tuple[int, float]], at: int) -> float:
    """Between the neighbours of `at` among the (place, value) pairs, which ascend; level beyond the ends."""
    if at <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if at <= right:
            return low + (high - low) * (at - left) / (right - left)
    return points[-1][1]


@torch.inference_mode()
def one_pass(model: Any, inputs: Inputs, row: Row, config: BenchConfig) -> Pass:
    """Encode, prefill, and a few decoding steps at each length."""
    device = model.device
    gc.collect()  # here, and not while something is timed
    with row.session(model) as session:
        encoder, encoded = timed(lambda: encode(model, inputs), device)
        seconds, (ids, cache) = timed(lambda: prefill(model, inputs, encoded), device)
        selector = 0.0 if session is None else session.report.timings.selector
        steps: dict[int, tuple[float, ...]] = {}
        answered = 1
        for length in config.output_tokens:
            if length > answered:
                grow(model, ids, cache, length - answered)
                answered = length
            timings = []
            for _ in range(config.steps):
                spent, ids = timed(lambda ids=ids: decode(model, ids, cache), device)
                timings.append(spent)
            answered += config.steps
            steps[length] = tuple(timings)
    return Pass(encoder, selector, seconds, steps)


@torch.inference_mode()
def plain_pass(model: Any, batch: int, length: int) -> float:
    """Seconds of a prefill of text, without any session: what the model takes for so many tokens."""
    ids = torch.full((batch, length), 3, device=model.device)
    return timed(lambda: prefill_text(model, ids), model.device)[0]


@dataclass(frozen=True)
class Holding:
    """What a row holds in memory and computes; the same in every pass."""

    peak_bytes: int
    """tensors during a whole pass, beyond weights and inputs"""
    kv_bytes: int
    """of the KV cache after the prefill"""
    auxiliary_bytes: int
    """of hidden states kept for tokens that may come back"""
    report: Report | None
    """None for the full model"""


@torch.inference_mode()
def hold(model: Any, inputs: Inputs, row: Row) -> Holding:
    """A pass that is not timed, which warms the machine up."""
    found: dict[str, Any] = {}

    def work() -> None:
        encoded = encode(model, inputs)
        ids, cache = prefill(model, inputs, encoded)
        found["kv_bytes"] = cache_bytes(cache)
        decode(model, ids, cache)

    with row.session(model) as session:
        if model.device.type == "cuda":
            work()  # libraries set up their workspaces on first use
        peak = peak_bytes(work, model.device)
        report = None if session is None else session.report
    return Holding(peak, found["kv_bytes"], 0 if report is None else report.auxiliary_bytes, report)


# -- the run ----------------------------------------------------------------------------------------------------------


def run(config: BenchConfig, console: Console | None = None) -> list[Record]:
    """Measures every row at every batch size; writes `bench.jsonl` and `bench.md` to `config.output`, if given.

    Args:
        config: what to run, from `load_config`.
        console: where the progress bar goes; default none.

    Returns:
        The lines of `bench.jsonl`: one a row and batch size.

    Raises:
        ConfigError: the model cannot be loaded, or the device is not there.
    """
    if config.on_gpu and not torch.cuda.is_available():
        raise ConfigError(f"device {config.device!r} is not available")
    with progress_bar(console, "building the model") as bar:
        model, make_inputs = _subject(config)
        weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        if config.computes_linear == "onednn":
            use_onednn(model)
        rows = table_rows(config, model)
        bar.expect(sum(row.status == OK for row in rows) * (config.rounds + 1) * len(config.batches))
        lines = [
            line | {"weight_bytes": weight_bytes}
            for batch in config.batches
            for line in _batch(model, make_inputs(batch), rows, config, batch, bar.advance)
        ]
    if config.output is not None:
        from vtprune.eval.bench.table import markdown

        config.output.mkdir(parents=True, exist_ok=True)
        write_atomically(config.output / "bench.jsonl", b"".join(map(to_line, lines)))
        write_atomically(config.output / "bench.md", markdown(lines).encode())
    return lines


def _subject(config: BenchConfig) -> tuple[Any, Callable[[int], Inputs]]:
    """The model, and what makes its inputs for a batch size."""
    if config.shape is not None:
        shape = shape_of(config.shape)
        model = build_model(shape, config.layers, config.dtype, config.attention, config.device)
        return model, lambda batch: random_inputs(shape, model, batch, config.text_tokens)

    from vtprune.eval.inputs import chat_inputs, load_model

    model, processor = load_model(config.model, config.dtype, config.attention, config.device)

    def make(batch: int) -> Inputs:
        height, width = config.image_size
        noise = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        image = Image.fromarray(noise.numpy())
        inputs = chat_inputs(processor, [image] * batch, [QUESTION] * batch).to(model.device, model.dtype)
        # Prompts are equal, so nothing is padded, and generate() leaves out a mask that masks nothing.
        return {name: value for name, value in inputs.items() if name != "attention_mask"}

    return model, make


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _batch(
    model: Any, inputs: Inputs, rows: Sequence[Row], config: BenchConfig, batch: int, done: Callable[[str], None]
) -> list[Record]:
    """The lines of one batch size."""
    holdings: dict[int, Holding] = {}
    for index, row in enumerate(rows):
        if row.status == OK:
            done(f"batch {batch}, warm-up: {row.label}")
            try:
                holdings[index] = hold(model, inputs, row)
            except UnsupportedStageError as error:
                row.refused(error)
    width = inputs["input_ids"].shape[1]
    widths = {i: [width] if h.report is None else _widths(h.report) for i, h in holdings.items()}
    passes: dict[int, list[Pass]] = {index: [] for index in holdings}
    plain: dict[int, list[float]] = {own[-1]: [] for own in widths.values() if own[-1] != width}
    for length in plain:
        plain_pass(model, batch, length)
    turns = [*((passes, index) for index in passes), *((plain, length) for length in plain)]
    order = random.Random(0)
    with _no_collection():
        for number in range(config.rounds):
            for measured, which in order.sample(turns, len(turns)):
                if measured is plain:
                    plain[which].append(plain_pass(model, batch, which))
                    continue
                done(f"batch {batch}, round {number + 1}: {rows[which].label}")
                passes[which].append(one_pass(model, inputs, rows[which], config))
    plain[width] = [p.prefill for p in passes[0]]
    shared = _shared(model, inputs, config, batch)
    lines = []
    for index, row in enumerate(rows):
        line = _line(row)
        if index in holdings:
            line |= _numbers(holdings[index], passes[index], passes[0], inputs, model)
            line |= _beside_plain(plain, widths[index], passes[index])
        lines.append(line | shared)
    return lines


def _widths(report: Report) -> list[int]:
    """Columns of each decoder layer's input; shorter samples of a batch are padded to the longest."""
    return (report.counts + torch.tensor(report.text_tokens)[:, None]).amax(0).tolist()


def _beside_plain(plain: Mapping[int, list[float]], widths: Sequence[int], passes: Sequence[Pass]) -> Record:
    """The speed-up that the model without a session has at the lengths of a row.

    plain: width of a prompt -> the seconds of its prefill, round by round. Widths between are interpolated; each layer
    takes its share.
    """
    seconds = []
    for number in range(len(passes)):
        points = sorted((width, samples[number]) for width, samples in plain.items())
        seconds.append(mean(_interpolated(points, width) for width in widths))
    speedup = paired(seconds, plain[max(plain)])
    return {
        "plain_prefill_speedup": speedup.to_dict(),
        "of_plain": paired([p.prefill for p in passes], seconds).median,
    }


def _shared(model: Any, inputs: Inputs, config: BenchConfig, batch: int) -> Record:
    """What holds for all rows of a batch size."""
    device = torch.cuda.get_device_name(model.device) if config.on_gpu else platform.machine()
    return {
        "batch_size": batch,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "decoder_layers": model.config.get_text_config().num_hidden_layers,
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "config": config.resolved(),
    }


def _line(row: Row) -> Record:
    """What identifies a row."""
    return {
        "label": row.label,
        "method": None if row.method is None else json.loads(json.dumps(row.method, default=str)),
        "keep_ratio": row.keep_ratio,
        "status": row.status,
        "reason": row.reason,
        "floor": row.floor,
    }


def _numbers(holding: Holding, passes: list[Pass], full: list[Pass], inputs: Inputs, model: Any) -> Record:
    """What was measured."""
    text_config = model.config.get_text_config()
    visual = (inputs["input_ids"] == vtprune.adapter_for(model).visual_token_ids["image"]).sum(1).tolist()
    length, layers = inputs["input_ids"].shape[1], text_config.num_hidden_layers
    unpruned = sum(cost.llm_prefill_flops(text_config, [count] * layers, length - count) for count in visual)
    head = len(visual) * cost.lm_head_flops(text_config)
    report = holding.report
    decoder = unpruned if report is None else report.prefill_flops
    lengths = list(full[0].steps)
    speedups = {
        "prefill": paired([p.prefill for p in passes], [p.prefill for p in full]),
        "first_token": paired([p.first_token for p in passes], [p.first_token for p in full]),
    }
    answers = {n: paired([p.answer(n) for p in passes], [p.answer(n) for p in full]) for n in lengths}
    ideal = (unpruned + head) / (decoder + head)
    return {
        "visual_tokens": mean(visual),
        "final_tokens": mean(visual if report is None else report.final_tokens),
        "measured_keep_ratio": 1.0 if report is None else report.keep_ratio,
        "prefill_flops": decoder + head,
        "seconds": {
            "encoder": _spread(p.encoder for p in passes),
            "selector": _spread(p.selector for p in passes),
            "prefill": _spread(p.prefill for p in passes),
            "first_token": _spread(p.first_token for p in passes),
            "per_token": {str(n): _spread(s for p in passes for s in p.steps[n]) for n in lengths},
            "answer": {str(n): _spread(p.answer(n) for p in passes) for n in lengths},
        },
        "peak_bytes": holding.peak_bytes,
        "kv_bytes": holding.kv_bytes,
        "auxiliary_bytes": holding.auxiliary_bytes,
        "ideal_prefill_speedup": ideal,
        "speedup": {
            **{name: spread.to_dict() for name, spread in speedups.items()},
            "answer": {str(n): spread.to_dict() for n, spread in answers.items()},
        },
        "realised": speedups["prefill"].median / ideal,
    }


def _spread(samples: Iterator[float]) -> Record:
    return Spread(tuple(samples)).to_dict()
