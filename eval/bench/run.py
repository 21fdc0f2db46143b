# SPDX-License-Identifier: Apache-2.0
"""`vtprune bench`: builds the model, measures all rows at every batch size, and writes the files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from vtprune.errors import ConfigError
from vtprune.eval.bench.config import BenchConfig
from vtprune.eval.bench.linear import use_onednn
from vtprune.eval.bench.passes import Inputs
from vtprune.eval.bench.rounds import measure_rows
from vtprune.eval.bench.rows import table_rows
from vtprune.eval.bench.shapes import build_model, random_inputs, shape_of
from vtprune.eval.progress import progress_bar
from vtprune.eval.results.records import Record, to_line, write_atomically
from vtprune.eval.results.status import OK

QUESTION = "What is shown in this image? Answer in one sentence."


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
        measured_rows = sum(row.status == OK for row in rows)
        bar.expect(measured_rows * (config.rounds + 1) * len(config.batches))
        lines = [
            line | {"weight_bytes": weight_bytes}
            for batch in config.batches
            for line in measure_rows(model, make_inputs(batch), rows, config, batch, bar.advance)
        ]
    if config.output is not None:
        from vtprune.eval.bench.table import markdown

        config.output.mkdir(parents=True, exist_ok=True)
        write_atomically(config.output / "bench.jsonl", b"".join(map(to_line, lines)))
        write_atomically(config.output / "bench.md", markdown(lines).encode())
    return lines


def _subject(config: BenchConfig) -> tuple[Any, Callable[[int], Inputs]]:
    """The model, and the function that makes its inputs for a batch size."""
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
        # The prompts are equal, so nothing is padded. generate() passes no mask on if it masks nothing.
        return {name: value for name, value in inputs.items() if name != "attention_mask"}

    return model, make
