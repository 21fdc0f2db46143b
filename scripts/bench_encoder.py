# SPDX-License-Identifier: Apache-2.0
"""Measures what methods inside the layers of a vision encoder save: images a second, beside what FLOPs promise.

    python scripts/bench_encoder.py [--shape vit-b-16] [--batch 8] [--rounds 5] [--linear onednn]

CLIP encoders of published shapes, random weights, noise as images. Every round runs every row once, in an order of its
own; speed-ups are taken round by round against the encoder without a session. On a CPU, linear layers in float32 are
computed by oneDNN, in all rows alike (`vtprune.eval.bench.linear` says why); `--linear torch` leaves them to torch.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, CLIPVisionModel

import vtprune
from vtprune.eval.bench.linear import use_onednn
from vtprune.eval.bench.shapes import CLIP_L_336
from vtprune.eval.bench.stopwatch import Spread, paired, timed
from vtprune.methods.in_layers import InLayers, LayerTokens
from vtprune.ops.token_reduction import Reduction

console = Console()

SHAPES: dict[str, dict[str, Any]] = {
    "vit-b-16": {
        "model_type": "clip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
    },
    "vit-l-14-336": CLIP_L_336,
}
ROWS: dict[str, Mapping[str, Any] | None] = {
    "full": None,
    "tome, r=16": {"name": "tome", "r": 16},
    "tome, r=16, no prop_attn": {"name": "tome", "r": 16, "prop_attn": False},
    "mctf": {"name": "mctf"},
    "zero_tprune": {"name": "zero_tprune"},
    "tca": {"name": "tca"},
}


class Linear(StrEnum):
    ONEDNN = "onednn"
    TORCH = "torch"


def build(shape: Mapping[str, Any]) -> CLIPVisionModel:
    """An encoder with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape)
    return CLIPVisionModel._from_config(config, attn_implementation="sdpa").eval()


@contextmanager
def choosing(method: InLayers) -> Iterator[list[float]]:
    """While it lasts, the seconds of each choice of what goes are added to the list."""
    spent: list[float] = []
    reduce = type(method).reduce

    def timed_reduce(self: InLayers, tokens: LayerTokens) -> Reduction | None:
        started = time.perf_counter()
        reduction = reduce(self, tokens)
        spent.append(time.perf_counter() - started)
        return reduction

    with patch.object(type(method), "reduce", timed_reduce):
        yield spent


@torch.inference_mode()
def one_round(model: Any, pixels: Tensor, row: Mapping[str, Any] | None) -> tuple[float, float]:
    """Seconds of the encoder, and of the method's choices in it."""
    if row is None:
        return timed(lambda: model(pixels), pixels.device)[0], 0.0
    with vtprune.prune(model, row) as session, choosing(session.methods[0]) as spent:
        total = timed(lambda: model(pixels), pixels.device)[0]
    return total, sum(spent)


@torch.inference_mode()
def promised(model: Any, pixels: Tensor, row: Mapping[str, Any] | None) -> tuple[float, int]:
    """FLOPs of the full encoder over those of a row, and the patches that are left."""
    if row is None:
        config = model.config
        return 1.0, (config.image_size // config.patch_size) ** 2
    with vtprune.prune(model, row) as session:
        model(pixels[:1])
    report = session.report
    return report.unpruned_encoder_flops / report.encoder_flops, report.final_tokens


def main(
    shape: str = typer.Option("", help=f"One of {', '.join(SHAPES)}; default all."),
    batch: int = typer.Option(8, min=1),
    rounds: int = typer.Option(5, min=1),
    linear: Linear = Linear.ONEDNN,
) -> None:
    """Prints a table for each shape."""
    if shape and shape not in SHAPES:
        raise typer.BadParameter(f"{shape}: expected one of {', '.join(SHAPES)}")
    for name in [shape] if shape else SHAPES:
        model = build(SHAPES[name])
        side = SHAPES[name]["image_size"]
        pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
        promises = {label: promised(model, pixels, row) for label, row in ROWS.items()}
        if linear is Linear.ONEDNN:
            use_onednn(model)
        for row in ROWS.values():  # warms up
            one_round(model, pixels, row)
        seconds: dict[str, list[float]] = {label: [] for label in ROWS}
        shares: dict[str, list[float]] = {label: [] for label in ROWS}
        for number in range(rounds):
            order = list(ROWS)
            random.Random(number).shuffle(order)
            for label in order:
                total, chosen = one_round(model, pixels, ROWS[label])
                seconds[label].append(total)
                shares[label].append(chosen / total)
        table = Table(title=f"{name}, batch {batch}, float32, {torch.get_num_threads()} threads, medians of {rounds}")
        for heading in ("method", "patches left", "images/s", "ideal", "measured", "realised", "choosing"):
            table.add_column(heading, justify="left" if heading == "method" else "right")
        for label in ROWS:
            ideal, left = promises[label]
            speedup = paired(seconds[label], seconds["full"]).median
            table.add_row(
                label,
                str(left),
                f"{batch / Spread(tuple(seconds[label])).median:.2f}",
                f"{ideal:.2f}x",
                f"{speedup:.2f}x",
                f"{100 * speedup / ideal:.0f} %",
                f"{100 * Spread(tuple(shares[label])).median:.1f} %",
            )
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
