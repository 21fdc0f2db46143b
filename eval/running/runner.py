# SPDX-License-Identifier: Apache-2.0
"""Runs the grid: loads each model once and runs every cell batch by batch; a killed run goes on where it stopped."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

import vtprune
from vtprune.errors import BudgetError, ConfigError, UnsupportedStageError
from vtprune.eval.config import EvalConfig
from vtprune.eval.inputs import InputCache, answers, chat_inputs, load_model, resolve_model
from vtprune.eval.inputs.downsample import Downsampler, FewerFrames
from vtprune.eval.pages.views import views_folder, write_views
from vtprune.eval.progress import progress_bar
from vtprune.eval.results.records import (
    CellFile,
    CellPart,
    Record,
    append,
    cell_path,
    to_line,
    write_atomically,
    writing,
)
from vtprune.eval.results.status import Refusal
from vtprune.eval.running.cells import Cell, Identity, expand
from vtprune.eval.running.measure import NOTHING_PRUNED, SHOWN, measure, result_lines
from vtprune.eval.running.processes import Processes
from vtprune.eval.tasks import TASKS, Example, Task


def run(config: EvalConfig, console: Console | None = None) -> list[Record]:
    """Runs every cell that is not in `config.output` yet; writes `results.jsonl`, `summary.md` and plots there.

    If `torchrun` starts several processes, they share the batches of every cell. The results are those of one process.

    Args:
        config: what to run, from `load_config`.
        console: where the progress bar goes; default none.

    Returns:
        The lines of `results.jsonl`, in the order of the configuration. Only the first process returns any.

    Raises:
        ConfigError: a model or a task cannot be loaded, a package is missing, or another run uses the output folder.
        VTPruneError: the results cannot be written.
    """
    tasks = {name: TASKS[name]() for name in config.task}
    video = ["av"] if any(task.kind == "video" for task in tasks.values()) else []
    for module in ("matplotlib", "numpy", "filelock", *video):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f'evaluation needs {module}: pip install "vtprune[eval]"')
    processes = Processes.start(config.device)
    with ExitStack() as stack:
        if processes.first:
            _claim(config.output, stack)
        studies = [Study.of(config, model, name, task) for model in config.model for name, task in tasks.items()]
        results = _run(config, studies, processes, console)
    processes.end()
    return results


def _claim(output: Path, stack: ExitStack) -> None:
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(FileLock(output / ".lock", timeout=0))
        except Timeout as error:
            raise ConfigError(f"{output}: another evaluation is running in this folder") from error


@dataclass
class Study:
    """One model on one task: the cells and the examples that all of them run over."""

    model: str
    task_name: str
    task: Task
    identity: Identity
    cells: list[Cell]
    paths: list[Path]
    examples: list[Example]
    batches: list[range]
    files: list[CellFile] = field(default_factory=list)
    """of the cells; only the first process has them"""
    remaining: list[list[range]] = field(default_factory=list)
    """the batches of each cell that still have to run"""

    @classmethod
    def of(cls, config: EvalConfig, model: str, name: str, task: Task) -> Study:
        cells = expand(config)
        identity = Identity.of(config, name, resolve_model(model))
        paths = [cell_path(config.output, cell.title, identity.key(cell)) for cell in cells]
        examples = list(task.examples(config.limit))
        starts = range(0, len(examples), config.batch_size)
        batches = [range(start, min(start + config.batch_size, len(examples))) for start in starts]
        return cls(model, name, task, identity, cells, paths, examples, batches)

    def open(self, processes: Processes) -> None:
        """Reads what earlier runs left of each cell."""
        # Only the first process reads and tidies these files. No process writes before that is done.
        if processes.first:
            self.files = [CellFile(path, self.batches) for path in self.paths]
        self.remaining = processes.share([file.remaining for file in self.files])

    def run(self, evaluator: Evaluator, processes: Processes, progress: Callable[[str, int], None]) -> None:
        """Runs this process's share of the remaining batches, cell by cell."""
        for place, (cell, batches) in enumerate(zip(self.cells, self.remaining, strict=True)):
            if not batches:
                continue
            part = CellPart(self.paths[place], processes.index)
            # The batches are those of a single process, so that the padding of an example stays the same.
            evaluator.run_cell(cell, batches[processes.index :: processes.count], part, progress)
            parts = processes.gather(part)
            if processes.first:
                self.files[place].finish(parts)
            progress(cell.title, sum(map(len, batches)) - part.examples)

    def results(self, config: EvalConfig) -> list[Record]:
        """The lines of the finished cells."""
        cells = list(zip(self.cells, self.files, strict=True))
        return result_lines(config, self.model, self.task_name, self.identity, cells)


def _run(config: EvalConfig, studies: Sequence[Study], processes: Processes, console: Console | None) -> list[Record]:
    for study in studies:
        study.open(processes)
    total = sum(len(study.examples) * len(study.cells) for study in studies)
    remaining = sum(len(batch) for study in studies for batches in study.remaining for batch in batches)
    with progress_bar(console if processes.first else None, "loading the model", total, total - remaining) as bar:
        for model in config.model:
            unfinished = [study for study in studies if study.model == model and any(study.remaining)]
            if unfinished:
                _run_model(config, unfinished, processes, bar.advance)
    if not processes.first:
        return []
    results = [line for study in studies for line in study.results(config)]
    write_atomically(config.output / "results.jsonl", b"".join(map(to_line, results)))
    _summarise(results, config.output)
    return results


def _run_model(
    config: EvalConfig, studies: Sequence[Study], processes: Processes, progress: Callable[[str, int], None]
) -> None:
    model, processor = load_model(studies[0].model, config.dtype, config.attention, processes.device)
    for study in studies:
        evaluator = Evaluator(config, study, model, processor)
        if processes.first:
            folder = views_folder(config.output, study.task_name, study.identity.model)
            write_views(folder, model, processor, study.examples[:SHOWN], study.task.kind)
        study.run(evaluator, processes, progress)


def _summarise(results: Sequence[Record], output: Path) -> None:
    from vtprune.eval.pages.plots import families, pareto
    from vtprune.eval.results.entries import studies
    from vtprune.eval.results.summary import summary_markdown

    write_atomically(output / "summary.md", summary_markdown(results).encode())
    with writing(output):
        for suffix, study in studies(results).items():
            pareto(study, output / f"pareto{suffix}.png")
            families(study, output / f"families{suffix}.png")


class Evaluator:
    """A loaded model and the examples that every cell runs over.

    Raises:
        ConfigError: the model does not take the task's kind of media.
    """

    def __init__(self, config: EvalConfig, study: Study, model: Any, processor: Any):
        task = study.task
        adapter = vtprune.adapter_for(model)
        if task.kind not in adapter.kinds:
            raise ConfigError(f"task {study.task_name!r} shows {task.kind}s, which {adapter.family} does not take")
        self.config = config
        self.task = task
        self.examples = study.examples
        self.model = model
        self.processor = processor
        self.inputs = InputCache(lambda batch: chat_inputs(processor, *self._asked(batch), task.kind))

    def _asked(self, batch: range) -> tuple[list[Any], list[str]]:
        """The media and the questions of a batch of examples."""
        examples = [self.examples[i] for i in batch]
        media = [e.video_path() if self.task.kind == "video" else e.image for e in examples]
        return media, [e.question for e in examples]

    def run_cell(
        self, cell: Cell, batches: Sequence[range], part: CellPart, progress: Callable[[str, int], None]
    ) -> None:
        """Runs `batches` and adds their records to `part`, or ends `part` if the cell cannot run."""
        progress(cell.title, 0)
        try:
            with ExitStack() as stack:
                prepare, session = self._open(cell, stack)
                for batch in batches:
                    started = time.perf_counter()
                    part.append(self._run_batch(batch, prepare(batch), session))
                    self._log_time(part, batch, time.perf_counter() - started)
                    progress(cell.title, len(batch))
        except (BudgetError, UnsupportedStageError) as error:
            part.end(Refusal.of(error))

    def _open(self, cell: Cell, stack: ExitStack) -> tuple[Callable[[range], Mapping[str, Any]], Any]:
        """The function that makes the inputs of a batch of the cell, and the cell's session, which `stack` closes.

        The baselines `full` and `downsample` run in a session that prunes nothing, because a session measures.
        """
        prepare: Callable[[range], Mapping[str, Any]] = self.inputs
        if cell.method == "downsample":
            smaller = self._downsampled(cell.keep_ratio, stack)

            def prepare(batch: range) -> Mapping[str, Any]:
                return smaller.inputs(*self._asked(batch))

        if cell.method in ("full", "downsample"):
            session = vtprune.prune(self.model, NOTHING_PRUNED)
        elif cell.method == "zero":
            session = vtprune.prune(self.model, "zero")
        else:
            session = vtprune.prune(self.model, cell.spec)
        return prepare, stack.enter_context(session)

    def _downsampled(self, keep_ratio: float, stack: ExitStack) -> Downsampler | FewerFrames:
        if self.task.kind == "video":
            return FewerFrames(self.processor, keep_ratio)
        downsampler = Downsampler(self.model, self.processor, keep_ratio)
        stack.enter_context(downsampler.interpolated())
        return downsampler

    def _run_batch(self, batch: range, inputs: Any, session: Any) -> list[Record]:
        limit = self.config.max_new_tokens or self.task.max_new_tokens
        predictions, _ = answers(self.model, self.processor, inputs, limit)
        measured = measure(session.report, batch)
        examples = [self.examples[i] for i in batch]
        return [
            {
                "index": index,
                "question": example.question,
                "family": example.family,
                "answer": example.answer,
                "prediction": prediction,
                "score": self.task.score(prediction, example.answer),
                **costs,
            }
            for index, example, prediction, costs in zip(batch, examples, predictions, measured, strict=True)
        ]

    def _log_time(self, part: CellPart, batch: range, seconds: float) -> None:
        line = {"cell": part.name, "first": batch.start, "examples": len(batch), "seconds": round(seconds, 4)}
        append(self.config.output / "timings.jsonl", to_line(line))
