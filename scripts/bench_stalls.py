# SPDX-License-Identifier: Apache-2.0
"""Counts how often the host waits for the device in a prefill, by torch's profiler, for every method.

    python scripts/bench_stalls.py --shape llava-1.5-7b --layers 4 --device cuda --dtype bfloat16 [--output FILE]

On a GPU a wait is a call of CUDA that synchronizes; copies to the host are counted beside it. On a CPU nothing waits.
There the operations are counted that would make the host wait: a value that is read, an output whose size depends on
values. (Plain copies to the host do not show there.)

The table has the waits between the end of the encoder and the first decoder layer, and those of the whole prefill after
the encoder. The first row is the model without a session. FILE gets the table as JSON.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.profiler import ProfilerActivity, profile, record_function

import vtprune
from vtprune.errors import VTPruneError
from vtprune.eval.bench.path import encode, prefill
from vtprune.eval.bench.shapes import build_model, random_inputs, shape_of

FIRST_LAYER = "the first decoder layer begins"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
"""Calls of CUDA."""
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::bincount")
"""Operations that read values of a device on the host, or need them to know a size."""

Event = Mapping[str, Any]
Counts = dict[str, int]


def waits(events: Iterable[Event], *, gpu: bool) -> Counts:
    """Waits and copies to the host in a trace of a prefill.

    Args:
        events: of the trace, of which one marks the first decoder layer. A copy on the device has the number
            (`correlation`) of the call of CUDA that started it, and counts where that call stands.
        gpu: whether to count calls of CUDA, or the operations that would wait on a GPU.

    Returns:
        `waits` and `copies` until the first decoder layer, and both of everything.
    """
    events = list(events)
    border = min(event["ts"] for event in events if event.get("name") == FIRST_LAYER)
    copies = {
        event["args"]["correlation"]
        for event in events
        if event.get("cat") == "gpu_memcpy" and event["name"].startswith("Memcpy DtoH")
    }
    names = WAITS if gpu else READS
    waited = [event["ts"] for event in events if event.get("name") in names]
    copied = [
        event["ts"]
        for event in events
        if event.get("cat") == "cuda_runtime" and event.get("args", {}).get("correlation") in copies
    ]
    return {
        "waits": sum(at < border for at in waited),
        "copies": sum(at < border for at in copied),
        "all_waits": len(waited),
        "all_copies": len(copied),
    }


@torch.inference_mode()
def traced_prefill(model: Any, inputs: Mapping[str, Any], method: str | None, keep_ratio: float | None) -> list[Event]:
    """The events of a prefill, after one that sets up what is made on first use. method: None for the full model."""
    gpu = model.device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports to stderr that there is no GPU

    def mark(*_: Any) -> None:
        with record_function(FIRST_LAYER):
            pass

    def run() -> list[Event]:
        prefill(model, inputs, encode(model, inputs))
        encoded = encode(model, inputs)
        if gpu:
            torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * gpu]) as profiler:
            prefill(model, inputs, encoded)
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(trace))
            return json.loads(trace.read_text())["traceEvents"]

    handle = vtprune.adapter_for(model).decoder_layers[0].register_forward_pre_hook(mark)
    try:
        if method is None:
            return run()
        budget = {} if keep_ratio is None else {"keep_ratio": keep_ratio}
        with vtprune.prune(model, method, **budget):
            return run()
    finally:
        handle.remove()


def count(model: Any, inputs: Mapping[str, Any], methods: Iterable[str], keep_ratio: float) -> list[dict[str, Any]]:
    """A row for the full model and for each method: its name and counts, or why there are none.

    A method that cannot keep `keep_ratio` runs as published.
    """
    gpu = model.device.type == "cuda"
    rows: list[dict[str, Any]] = [{"method": "full"} | waits(traced_prefill(model, inputs, None, None), gpu=gpu)]
    for method in methods:
        needs_budget = vtprune.list_methods()[method].needs_budget
        for ratio in (keep_ratio, *[None] * (not needs_budget)):
            try:
                rows.append({"method": method} | waits(traced_prefill(model, inputs, method, ratio), gpu=gpu))
                break
            except VTPruneError as error:
                reason = str(error).splitlines()[0]
        else:
            rows.append({"method": method, "refused": reason})
    return rows


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| method | waits before the LLM | copies | waits of the prefill | copies |", "|---|---|---|---|---|"]
    for row in rows:
        cells = ["–"] * 4 if "refused" in row else [row[key] for key in ("waits", "copies", "all_waits", "all_copies")]
        lines.append(f"| {' | '.join(map(str, (row['method'], *cells)))} |")
    return "\n".join(lines)


def main(
    shape: Annotated[str, typer.Option(help="A shape of `vtprune bench`.")] = "llava-1.5-7b",
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers; default all.")] = None,
    device: Annotated[str, typer.Option()] = "cuda",
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    attention: Annotated[str, typer.Option()] = "sdpa",
    methods: Annotated[str | None, typer.Option(help="Names, separated by commas; default all.")] = None,
    keep_ratio: Annotated[float, typer.Option()] = 0.33,
    output: Annotated[Path | None, typer.Option(help="File for the rows as JSON.")] = None,
) -> None:
    """Prints the table."""
    model = build_model(shape_of(shape), layers, dtype, attention, device)
    inputs = random_inputs(shape_of(shape), model, batch=1, text_tokens=128)
    names = vtprune.list_methods() if methods is None else methods.split(",")
    rows = count(model, inputs, names, keep_ratio)
    typer.echo(table(rows))
    for row in rows:
        if "refused" in row:
            typer.echo(f"* {row['method']}: {row['refused']}")
    if output is not None:
        output.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    typer.run(main)
