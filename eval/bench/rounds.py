# SPDX-License-Identifier: Apache-2.0
"""The measurement at one batch size: every row once a round, in an order drawn anew each time.

So a drift of the machine hits all rows alike.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vtprune.errors import UnsupportedStageError
from vtprune.eval.bench import lines
from vtprune.eval.bench.config import BenchConfig
from vtprune.eval.bench.passes import Holding, Inputs, Pass, hold, one_pass, plain_pass
from vtprune.eval.bench.rows import Row
from vtprune.eval.results.records import Record
from vtprune.eval.results.status import OK


def measure_rows(
    model: Any, inputs: Inputs, rows: Sequence[Row], config: BenchConfig, batch: int, progress: Callable[[str], None]
) -> list[Record]:
    """Measures all rows at one batch size.

    Args:
        model: the model, on its device.
        inputs: arguments of the model for `batch` prompts.
        rows: the full model first. A row that the model turns out not to support gets that status.
        config: what to run.
        batch: number of prompts.
        progress: called with a label before each pass of a row.

    Returns:
        A line of `bench.jsonl` for each row.
    """
    holdings: dict[int, Holding] = {}
    for index, row in enumerate(rows):
        if row.status == OK:
            progress(f"batch {batch}, warm-up: {row.label}")
            try:
                holdings[index] = hold(model, inputs, row, config)
            except UnsupportedStageError as error:
                row.refused(error)
    prompt_width = inputs["input_ids"].shape[1]
    widths = {i: _layer_widths(holding, prompt_width) for i, holding in holdings.items()}
    last_widths = dict.fromkeys(layer_widths[-1] for layer_widths in widths.values())
    passes: dict[int, list[Pass]] = {index: [] for index in holdings}
    plain: dict[int, list[float]] = {width: [] for width in last_widths if width != prompt_width}
    for width in plain:
        plain_pass(model, batch, width)

    def measure_row(index: int, number: int) -> None:
        progress(f"batch {batch}, round {number}: {rows[index].label}")
        passes[index].append(one_pass(model, inputs, rows[index], config))

    def measure_plain(width: int, number: int) -> None:
        plain[width].append(plain_pass(model, batch, width))

    turns = [*((measure_row, index) for index in passes), *((measure_plain, width) for width in plain)]
    order = random.Random(0)
    with _no_garbage_collection():
        for number in range(1, config.rounds + 1):
            for measure, which in order.sample(turns, len(turns)):
                measure(which, number)
    plain[prompt_width] = [full.prefill for full in passes[0]]
    shared = lines.of_batch_size(model, inputs, config, batch)
    found = []
    for index, row in enumerate(rows):
        line = lines.of_row(row)
        if index in holdings:
            line |= lines.numbers(holdings[index], passes[index], passes[0], inputs, model)
            line |= lines.beside_plain(plain, widths[index], passes[index], passes[0])
        found.append(line | shared)
    return found


def _layer_widths(holding: Holding, prompt_width: int) -> list[int]:
    """Columns of each decoder layer's input; shorter samples of a batch are padded to the longest.

    For the full model one number stands for all layers.
    """
    report = holding.report
    if report is None:
        return [prompt_width]
    return (report.counts + torch.tensor(report.text_tokens)[:, None]).amax(0).tolist()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
