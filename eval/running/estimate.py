# SPDX-License-Identifier: Apache-2.0
"""`vtprune eval --dry-run`: the cost of the cells of an evaluation, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

import vtprune
from vtprune.adapters.base import Adapter
from vtprune.cost import llm_prefill_flops
from vtprune.errors import BudgetError, ConfigError, UnsupportedStageError
from vtprune.eval.config import BASELINES, EvalConfig
from vtprune.eval.inputs import conversation_inputs, resolve_model
from vtprune.eval.results.formatting import flops
from vtprune.eval.results.status import UNDER_FLOOR, status_text
from vtprune.eval.running.cells import Cell, expand
from vtprune.eval.running.evaluator import refuse_mismatches
from vtprune.eval.tasks import AnyTask, Classification, open_tasks
from vtprune.methods import build_methods
from vtprune.plan import Prompt, plan
from vtprune.tokens import ModelShape

_EXAMPLES = 8
"""Number of examples, the first ones, whose prompts are measured."""


def estimate_tables(config: EvalConfig) -> Iterator[Table]:
    """One table for each model on each task, with a line for each cell.

    A line has the visual tokens averaged over the layers, and the FLOPs of the LLM's prefill. Both are means over the
    task's first examples. Raises ConfigError if a model's config or processor cannot be loaded, and for a task of
    classes: what a CLIP costs is not estimated.
    """
    tasks = open_tasks(config.task, config.include_path)
    for name, task in tasks.items():
        if isinstance(task, Classification):
            raise ConfigError(f"--dry-run: {name} is a task of classes, whose cost is not estimated; run it")
    refuse_mismatches(config, tasks)
    for model in config.model:
        adapter, processor = _on_paper(model)
        for name, task in tasks.items():
            prompts = _prompts(adapter, processor, task, config.limit)
            full = _flops(adapter, prompts, [[p.visual] * adapter.shape.decoder_layers for p in prompts])
            cells = expand(config)
            table = Table(title=escape(f"{name}, {model}: {len(cells)} cells"))
            table.caption = f"estimated from the first {_EXAMPLES} prompts and the config; a run measures"
            table.add_column("cell", overflow="fold")
            for column in ("visual tokens", "prefill FLOPs", "of full"):
                table.add_column(column, justify="right", no_wrap=True)
            for cell in cells:
                try:
                    counts = [layer_counts(cell, adapter.shape, prompt) for prompt in prompts]
                except (BudgetError, UnsupportedStageError, ConfigError) as error:
                    columns = ["", f"[dim]{escape(_why_not(error))}[/dim]", ""]
                else:
                    columns = _columns(adapter, prompts, counts, full)
                table.add_row(escape(cell.title), *columns)
            yield table


def _columns(adapter: Adapter, prompts: Sequence[Prompt], counts: Sequence[list[float] | None], full: float) -> list:
    if None in counts:
        return ["", "[dim]depends on the data[/dim]", ""]
    spent = _flops(adapter, prompts, counts)
    average = sum(map(sum, counts)) / len(counts) / adapter.shape.decoder_layers
    return [f"{average:.1f}", flops(spent), f"{spent / full:.1%}"]


def _why_not(error: Exception) -> str:
    if isinstance(error, BudgetError) and error.floor is not None:
        return status_text(UNDER_FLOOR, error.floor)
    return str(error)


def _on_paper(model: str) -> tuple[Adapter, Any]:
    """The adapter of a model whose weights are not loaded, and the model's processor."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    path = resolve_model(model)
    try:
        with torch.device("meta"):
            empty = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path))
        return vtprune.adapter_for(empty), AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model {path!r} cannot be read: {str(error).strip().splitlines()[0]}") from error


def _prompts(adapter: Adapter, processor: Any, task: AnyTask, limit: int | None) -> list[Prompt]:
    if task.kind not in adapter.kinds:
        raise ConfigError(f"the task shows {task.kind}s, which {adapter.family} does not take")
    found = []
    # Data may have mistakes further behind, which are refused now. What the library draws has none, and takes long.
    asked = _EXAMPLES if task.digest is None else limit
    for example in task.examples(asked)[:_EXAMPLES]:
        inputs = conversation_inputs(processor, [example.conversation()])
        visual = int((inputs["input_ids"] == adapter.visual_token_ids[task.kind]).sum())
        crops = len(adapter.encoder_sequences(task.kind, inputs))
        found.append(Prompt(visual, crops, int(inputs["attention_mask"].sum()) - visual))
    return found


def _flops(adapter: Adapter, prompts: Sequence[Prompt], counts: Sequence[list[float]]) -> float:
    each = [llm_prefill_flops(adapter.text_config, c, p.text) for p, c in zip(prompts, counts, strict=True)]
    return sum(each) / len(each)


def layer_counts(cell: Cell, shape: ModelShape, prompt: Prompt) -> list[float] | None:
    """Visual tokens that would enter each decoder layer; None if only the data decide.

    Raises:
        VTPruneError: `vtprune.prune` would refuse the cell.
    """
    if cell.method in BASELINES:
        return [prompt.visual * cell.keep_ratio] * shape.decoder_layers
    return plan(build_methods(cell.spec), shape, prompt)
