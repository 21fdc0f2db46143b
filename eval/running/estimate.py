# SPDX-License-Identifier: Apache-2.0
"""`vtprune eval --dry-run`: the cost of the cells of an evaluation, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

import vtprune
from vtprune.adapters.base import Adapter
from vtprune.cost import llm_prefill_flops
from vtprune.errors import BudgetError, ConfigError, UncheckedError, UnsupportedStageError
from vtprune.eval.config import EvalConfig
from vtprune.eval.inputs import conversation_inputs, empty_model, resolve_model
from vtprune.eval.inputs.downsample import Downsampler, FewerFrames, smaller_medium
from vtprune.eval.inputs.models import loading
from vtprune.eval.method_rows import BASELINES
from vtprune.eval.results.entries import conditions
from vtprune.eval.results.formatting import flops
from vtprune.eval.results.status import Refusal, status_text
from vtprune.eval.running.cells import Cell, expand
from vtprune.eval.running.devices import with_devices
from vtprune.eval.running.evaluator import refuse_mismatches
from vtprune.eval.tasks import AnyTask, Classification, Example, Kind, open_tasks
from vtprune.methods.base import AfterPrefill, BeforeLLM, InLLM, Method
from vtprune.methods.in_layers import InLayers
from vtprune.plan import Prompt, plan
from vtprune.stages.in_layers import refuse_mixed_tokens

_EXAMPLES = 8
"""Number of examples, the first ones, whose prompts are measured."""


def estimate_tables(config: EvalConfig) -> Iterator[Table]:
    """One table for each model on each task, with a line for each cell.

    A line has the visual tokens averaged over the layers, and the FLOPs of the LLM's prefill. Both are means over the
    task's first examples. What a run would refuse is refused here, with the same reason. Raises ConfigError if a
    model's config or processor cannot be loaded, if a device is not there, and for a task of classes: what a CLIP costs
    is not estimated.
    """
    config = with_devices(config)
    tasks = open_tasks(config.task, config.include_path)
    for name, task in tasks.items():
        if isinstance(task, Classification):
            raise ConfigError(f"--dry-run: {name} is a task of classes, whose cost is not estimated; run it")
    refuse_mismatches(config, tasks)
    for model in config.model:
        for axes, own in config.combinations():
            loaded = _on_paper(model, own)
            for name, task in tasks.items():
                yield _table(f"{name}, {model}{conditions({'axes': axes})}", own, *loaded, task)


def _table(title: str, config: EvalConfig, model: Any, processor: Any, task: AnyTask) -> Table:
    adapter, cells = vtprune.adapter_for(model), expand(config)
    table = Table(title=escape(f"{title}: {len(cells)} cells"), caption_justify="left")
    table.add_column("cell", overflow="fold", min_width=16)
    for column in ("visual tokens", "prefill FLOPs", "of full"):
        table.add_column(column, justify="right")
    # Data may have mistakes further behind, which are refused now. What the library draws has none, and takes long.
    examples = task.examples(_EXAMPLES if task.digest is None else config.limit)[:_EXAMPLES]
    asked = _asked(adapter, processor, task.kind, examples)
    full = _flops(adapter, asked, [[a.prompt.visual] * adapter.shape.decoder_layers for a in asked])
    notes: dict[str, int] = {}  # reason -> its number
    for cell in cells:
        try:
            own, counts = _counts(cell, model, processor, task.kind, examples, asked)
        except UncheckedError as error:
            columns = _without_numbers("decided when it runs", str(error), notes)
        except (BudgetError, UnsupportedStageError) as error:
            refusal = Refusal.of(error)
            columns = _without_numbers(status_text(refusal.status, refusal.floor), refusal.reason, notes)
        else:
            columns = _columns(adapter, own, counts, full)
        table.add_row(escape(cell.title), *columns)
    reasons = "".join(f"\n[{number}] {reason}" for reason, number in notes.items())
    table.caption = escape(f"estimated from the first {_EXAMPLES} prompts and the config; a run measures{reasons}")
    return table


def _without_numbers(status: str, reason: str, notes: dict[str, int]) -> list[str]:
    number = notes.setdefault(reason, len(notes) + 1)
    return ["", f"[dim]{escape(f'{status} [{number}]')}[/dim]", ""]


def _columns(adapter: Adapter, asked: Sequence[_Asked], counts: Sequence[list[float] | None], full: float) -> list:
    if None in counts:
        return ["", "[dim]depends on the data[/dim]", ""]
    spent = _flops(adapter, asked, counts)
    average = sum(map(sum, counts)) / len(counts) / adapter.shape.decoder_layers
    return [f"{average:.1f}", flops(spent), f"{spent / full:.1%}"]


def _on_paper(model: str, config: EvalConfig) -> tuple[Any, Any]:
    """A model whose weights are not loaded, and its processor."""
    from transformers import AutoProcessor

    empty = empty_model(model, dtype=getattr(torch, config.dtype), attn_implementation=config.attention)
    path = resolve_model(model)
    with loading(path):
        return empty, AutoProcessor.from_pretrained(path)


@dataclass(frozen=True)
class _Asked:
    """One prompt, and the inputs that it is read off."""

    prompt: Prompt
    inputs: Any


def _asked(
    adapter: Adapter,
    processor: Any,
    kind: Kind,
    examples: Sequence[Example],
    smaller: Downsampler | FewerFrames | None = None,
) -> list[_Asked]:
    """The prompts of examples; smaller: what makes their images smaller."""
    if kind not in adapter.kinds:
        raise ConfigError(f"the task shows {kind}s, which {adapter.family} does not take")
    found = []
    for example in examples:
        asked = [example.conversation()]
        inputs = conversation_inputs(processor, asked) if smaller is None else smaller.inputs(asked)
        visual = int((inputs["input_ids"] == adapter.visual_token_ids[kind]).sum())
        crops = len(adapter.encoder_sequences(kind, inputs))
        found.append(_Asked(Prompt(visual, crops, int(inputs["attention_mask"].sum()) - visual), inputs))
    return found


def _flops(adapter: Adapter, asked: Sequence[_Asked], counts: Sequence[list[float]]) -> float:
    each = [llm_prefill_flops(adapter.text_config, c, a.prompt.text) for a, c in zip(asked, counts, strict=True)]
    return sum(each) / len(each)


def _counts(
    cell: Cell, model: Any, processor: Any, kind: Kind, examples: Sequence[Example], asked: Sequence[_Asked]
) -> tuple[Sequence[_Asked], list[list[float] | None]]:
    """The prompts of a cell, and the visual tokens that would enter each decoder layer; None if only the data decide.

    asked: the prompts of the examples. Raises VTPruneError if a run would refuse the cell.
    """
    adapter = vtprune.adapter_for(model)
    layers = adapter.shape.decoder_layers
    if cell.method == "downsample":
        smaller = smaller_medium(model, processor, kind, cell.keep_ratio)
        asked = _asked(adapter, processor, kind, examples, smaller)
    if cell.method in BASELINES:
        share = 0 if cell.method == "zero" else 1
        return asked, [[one.prompt.visual * share] * layers for one in asked]
    methods = vtprune.prune(model, cell.spec).methods  # the session is not opened: it checks what it is made of
    _check_inputs(adapter, methods, kind, asked)
    return asked, [plan(methods, adapter.shape, one.prompt) for one in asked]


def _check_inputs(adapter: Adapter, methods: Sequence[Method], kind: Kind, asked: Sequence[_Asked]) -> None:
    """Raises UnsupportedStageError, or UncheckedError, for what a session finds out when its first inputs come."""
    for method in methods:
        if isinstance(method, InLayers):
            for one in asked:
                lengths = adapter.encoder_sequences(kind, one.inputs)
                tokens = lengths[0] + int(adapter.shape.has_cls)
                refuse_mixed_tokens(method, adapter, kind, one.inputs, len(lengths), tokens)
    acting = [method for method in methods if not isinstance(method, InLLM | AfterPrefill)]
    if len(acting) > 1 and isinstance(acting[-1], BeforeLLM):
        names = " and ".join(method.name for method in acting)
        raise UncheckedError(f"whether {names} can act one behind the other shows when the first of them has acted")
