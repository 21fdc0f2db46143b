# SPDX-License-Identifier: Apache-2.0
"""Measures what a session costs where nothing is chosen: steps of decoding, prompts of text, `keep_ratio=1`, long use.

    python scripts/bench_session.py [--part decode|idle|requests] [--layers 16] [--rounds 7] [--steps 24]
                                    [--requests 1000]

The model is so narrow that what Python does shows. Two models with the same weights take turns, call by call, one in a
session and one without; the plain one is given text as long as what the session has left. A round's ratio is that of
the medians of its calls, and tables hold the medians of all rounds. CPU time of one thread.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import vtprune
from vtprune.testing import families
from vtprune.transformers_private import CACHE

console = Console()

ROWS: dict[str, Mapping[str, Any]] = {
    "divprune": {"name": "divprune", "keep_ratio": 0.3, "positions": "original"},
    "divprune, compact": {"name": "divprune", "keep_ratio": 0.3, "positions": "compact"},
    "fastv": {"name": "fastv", "keep_ratio": 0.5, "positions": "original"},
    "fastv, compact": {"name": "fastv", "keep_ratio": 0.5, "positions": "compact"},
    "pdrop": {"name": "pdrop", "keep_ratio": 0.5, "positions": "original"},
    "pdrop, compact": {"name": "pdrop", "keep_ratio": 0.5, "positions": "compact"},
    "transprune": {"name": "transprune", "keep_ratio": 0.5, "positions": "original"},
    "transprune, compact": {"name": "transprune", "keep_ratio": 0.5, "positions": "compact"},
}
BATCHES = (1, 8)
TEXT, WORD = 12, 33
"""Tokens of text around an image, and the id of one."""


class Part(StrEnum):
    DECODE = "decode"
    IDLE = "idle"
    REQUESTS = "requests"


def build(layers: int) -> Any:
    """A narrow LLaVA with random weights, the same at each call."""
    return families.build("llava", num_hidden_layers=layers, max_position_embeddings=4096)


def with_images(model: Any, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Prompts of one image each; all but the first are padded on the left, each by another length."""
    vision, generator = model.config.vision_config, torch.Generator().manual_seed(seed)
    tokens = (vision.image_size // vision.patch_size) ** 2
    inputs = of_text(batch, tokens + TEXT)
    inputs["input_ids"][:, -tokens - TEXT // 2 : -TEXT // 2] = model.config.image_token_id
    size = (batch, 3, vision.image_size, vision.image_size)
    return inputs | {"pixel_values": torch.randn(size, generator=generator)}


def of_text(batch: int, length: int) -> dict[str, Tensor]:
    """Prompts of text alone, padded likewise."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        mask[row, : row % (TEXT // 2)] = 0
    return {"input_ids": torch.full((batch, length), WORD) * mask, "attention_mask": mask}


class Answer:
    """A prefill, and the steps behind it as `generate()` makes them."""

    def __init__(self, model: Any, inputs: Mapping[str, Tensor]):
        self.model = model
        self.cache = model(**inputs, use_cache=True, logits_to_keep=1)[CACHE]
        self.mask = inputs["attention_mask"]
        self.places = self.mask.sum(1, keepdim=True) - 1
        self.ids = torch.full((len(self.mask), 1), WORD)

    def step(self) -> float:
        """Seconds that one more token takes."""
        self.mask, self.places = nn.functional.pad(self.mask, (0, 1), value=1), self.places + 1
        inputs = {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.places, CACHE: self.cache}
        return seconds(lambda: self.model(**inputs, use_cache=True, logits_to_keep=1))

    def columns(self) -> int:
        """Columns in the cache, averaged over its layers."""
        stored = [layer.keys.shape[2] for layer in self.cache.layers]
        return round(statistics.mean(stored))


def seconds(work: Callable[[], object]) -> float:
    """CPU time of this thread during `work`."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


@contextmanager
def _without_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def in_turns(plain: Callable[[], float], pruned: Callable[[], float], times: int) -> tuple[float, float]:
    """Median seconds of two things that take turns."""
    with _without_collection():
        pairs = [(plain(), pruned()) for _ in range(times)]
    first, second = zip(*pairs, strict=True)
    return statistics.median(first), statistics.median(second)


def steps_of(
    plain: Any, model: Any, row: Mapping[str, Any], inputs: Mapping[str, Tensor], steps: int
) -> tuple[float, float]:
    """Median seconds of a step without a session, and of one in a session behind a prefill of `inputs`."""
    with vtprune.prune(model, row, strict=False):
        answer = Answer(model, inputs)
        other = Answer(plain, of_text(len(inputs["input_ids"]), answer.columns()))
        for _ in range(3):
            other.step(), answer.step()
        return in_turns(other.step, answer.step, steps)


def prefills_of(
    plain: Any, model: Any, row: Mapping[str, Any], inputs: Mapping[str, Tensor], times: int
) -> tuple[float, float]:
    """Median seconds of a prefill without a session, and of the same one in a session."""
    with vtprune.prune(model, row, strict=False):
        calls = [partial(seconds, partial(m, **inputs, use_cache=True, logits_to_keep=1)) for m in (plain, model)]
        for call in calls:
            call()
        return in_turns(*calls, times)


def table_of(title: str, measured: Mapping[str, Callable[[], tuple[float, float]]], rounds: int) -> Table:
    """One line for each thing measured, all of them once a round."""
    found: dict[str, list[tuple[float, float]]] = {label: [] for label in measured}
    for _ in range(rounds):
        for label, measure in measured.items():
            found[label].append(measure())
    table = Table(title=f"{title}, medians of {rounds}")
    for heading in ("", "plain", "in a session", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, pairs in found.items():
        plain, pruned = (statistics.median(values) for values in zip(*pairs, strict=True))
        ratio = statistics.median(session / without for without, session in pairs)
        table.add_row(label, f"{plain * 1e3:.2f} ms", f"{pruned * 1e3:.2f} ms", f"{ratio:.3f}x")
    return table


@torch.inference_mode()
def decode(layers: int, rounds: int, steps: int) -> None:
    """A generated token behind a pruned prompt."""
    plain, model = build(layers), build(layers)
    for batch in BATCHES:
        inputs = with_images(model, batch)
        measured = {label: partial(steps_of, plain, model, row, inputs, steps) for label, row in ROWS.items()}
        console.print(table_of(f"a step of {batch} sequences, {layers} layers", measured, rounds))


@torch.inference_mode()
def idle(layers: int, rounds: int, steps: int) -> None:
    """Prompts of which nothing is dropped."""
    plain, model = build(layers), build(layers)
    text, images = of_text(1, 64), with_images(model, 1)
    measured = {}
    for label in ("divprune", "transprune"):
        row, everything = ROWS[label], {"name": label, "keep_ratio": 1.0}
        for what, measure in (("prefill", prefills_of), ("step", steps_of)):
            measured |= {
                f"{label}, text, {what}": partial(measure, plain, model, row, text, steps),
                f"{label}, keep_ratio=1, {what}": partial(measure, plain, model, everything, images, steps),
            }
    console.print(table_of(f"nothing to drop, {layers} layers", measured, rounds))


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@torch.inference_mode()
def mixed(model: Any, count: int, tokens: int = 4) -> list[float]:
    """CPU seconds of so many requests: one image, a batch of images, text, one after the other."""
    kinds: Sequence[Callable[[int], dict[str, Tensor]]] = (
        lambda number: with_images(model, 1, number),
        lambda number: of_text(1, TEXT + number % 7),
        lambda number: with_images(model, 3, number),
    )
    taken = []
    for number in range(count):
        inputs = kinds[number % len(kinds)](number)
        taken.append(seconds(partial(model.generate, **inputs, max_new_tokens=tokens)))
    return taken


def requests(layers: int, count: int) -> None:
    """One session that serves many requests."""
    table = Table(title=f"one session, {layers} layers, requests of one image, of text and of three images in turn")
    for heading in ("method", "requests", "CPU time each", "memory", "Python objects"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for label in ("divprune", "pdrop", "transprune"):
        model, part = build(layers), max(count // 5, 1)
        with ExitStack() as stack:
            stack.enter_context(vtprune.prune(model, ROWS[label]))
            mixed(model, min(part, 30))
            for number in range(0, count, part):
                each = statistics.median(mixed(model, part))
                gc.collect()
                memory, objects = f"{resident() / 2**20:,.1f} MiB", f"{len(gc.get_objects()):,}"
                table.add_row(label, f"{number + part:,}", f"{each * 1e3:.1f} ms", memory, objects)
    console.print(table)


def main(
    part: str = typer.Option("", help=f"One of {', '.join(Part)}; default all."),
    layers: int = typer.Option(16, min=4),
    rounds: int = typer.Option(7, min=1),
    steps: int = typer.Option(24, min=1),
    count: int = typer.Option(1000, "--requests", min=1),
) -> None:
    """Prints the tables."""
    parts = [Part(part)] if part else list(Part)
    torch.set_num_threads(1)
    if Part.DECODE in parts:
        decode(layers, rounds, steps)
    if Part.IDLE in parts:
        idle(layers, rounds, steps)
    if Part.REQUESTS in parts:
        requests(layers, count)


if __name__ == "__main__":
    typer.run(main)
