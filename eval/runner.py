# SPDX-License-Identifier: Apache-2.0
"""Runs the grid: one model, loaded once; every cell through `vtprune.prune`, batch by batch, from where it stopped."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import vtprune
from vtprune.errors import BudgetError, ConfigError, UnsupportedStageError
from vtprune.eval.cells import Cell, Identity, expand
from vtprune.eval.config import EvalConfig
from vtprune.eval.downsample import Downsampler, FewerFrames
from vtprune.eval.inputs import InputCache, answers, chat_inputs, load_model, resolve_model
from vtprune.eval.measure import SHOWN, measure, result_lines
from vtprune.eval.results import CellFile, Record, cell_path, to_line, write_atomically
from vtprune.eval.tasks import TASKS, Example, Task
from vtprune.eval.views import views_folder, write_views

UNDER_FLOOR = "under its floor"
UNSUPPORTED = "unsupported"
_NOTHING_PRUNED = {"name": "uniform", "keep_ratio": 1.0}


def run(config: EvalConfig, console: Console | None = None) -> list[Record]:
    """Runs every cell that `config.output` does not hold yet; writes `results.jsonl`, `summary.md` and plots there.

    Args:
        config: what to run, from `load_config`.
        console: where the progress bar goes; default none.

    Returns:
        The lines of `results.jsonl`, in the order of the configuration.

    Raises:
        ConfigError: the model or the task cannot be loaded, what evaluation needs is not installed, or another run
            holds the output folder.
    """
    task = TASKS[config.task]()
    for module in ("matplotlib", "numpy", "filelock", *(["av"] if task.kind == "video" else [])):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f'evaluation needs {module}: pip install "vtprune[eval]"')
    config.output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(config.output / ".lock", timeout=0):
            return _run(config, task, console or Console(quiet=True))
    except Timeout as error:
        raise ConfigError(f"{config.output}: another evaluation is running in this folder") from error


def _run(config: EvalConfig, task: Task, console: Console) -> list[Record]:
    from vtprune.eval.plots import families, pareto
    from vtprune.eval.summary import summary_markdown

    cells = expand(config)
    model_path = resolve_model(config.model)
    identity = Identity.of(config, model_path)
    examples = list(task.examples(config.limit))
    batches = [range(i, min(i + config.batch_size, len(examples))) for i in range(0, len(examples), config.batch_size)]
    files = [CellFile(_path(config.output, cell, identity), batches) for cell in cells]

    if not all(file.complete for file in files):
        with _progress(console, files, len(examples)) as report_progress:
            model, processor = load_model(config.model, config.dtype, config.attention, config.device)
            evaluator = Evaluator(config, task, examples, model, processor)
            views = views_folder(config.output, config.task, identity.model)
            write_views(views, model, processor, examples[:SHOWN], task.kind)
            for cell, file in zip(cells, files, strict=True):
                evaluator.run_cell(cell, file, report_progress)

    results = result_lines(config, identity, list(zip(cells, files, strict=True)))
    write_atomically(config.output / "results.jsonl", b"".join(map(to_line, results)))
    write_atomically(config.output / "summary.md", summary_markdown(results).encode())
    pareto(results, config.output / "pareto.png")
    families(results, config.output / "families.png")
    return results


def _path(output: Path, cell: Cell, identity: Identity) -> Path:
    budget = "" if cell.keep_ratio is None else f"-{cell.keep_ratio:g}"
    seed = "" if cell.seed is None else f"-seed{cell.seed}"
    return cell_path(output, f"{cell.label}{budget}{seed}", identity.key(cell))


@contextmanager
def _progress(console: Console, files: Sequence[CellFile], examples: int) -> Iterator[Callable[[str, int], None]]:
    """A bar over all examples of all cells; yields a function that takes (what runs, examples done since)."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        done = sum(examples if file.complete else len(file.records) for file in files)
        row = bar.add_task("loading the model", total=examples * len(files), completed=done)
        yield lambda label, count: bar.update(row, description=label, advance=count)


class Evaluator:
    """A loaded model and the examples that every cell runs over.

    Raises:
        ConfigError: the model does not take what the task shows.
    """

    def __init__(self, config: EvalConfig, task: Task, examples: Sequence[Example], model: Any, processor: Any):
        adapter = vtprune.adapter_for(model)
        if task.kind not in adapter.kinds:
            raise ConfigError(f"task {config.task!r} shows {task.kind}s, which {adapter.family} does not take")
        self.config = config
        self.task = task
        self.examples = examples
        self.model = model
        self.processor = processor
        self.inputs = InputCache(lambda batch: chat_inputs(processor, *self._asked(batch), task.kind))

    def _asked(self, batch: range) -> tuple[list[Any], list[str]]:
        """The media and the questions of some examples."""
        examples = [self.examples[i] for i in batch]
        media = [e.video_path() if self.task.kind == "video" else e.image for e in examples]
        return media, [e.question for e in examples]

    def run_cell(self, cell: Cell, file: CellFile, progress: Callable[[str, int], None]) -> None:
        """Runs the batches that `file` lacks and appends their records."""
        label = cell.label if cell.keep_ratio in (None, 0.0, 1.0) else f"{cell.label} {cell.keep_ratio:.1%}"
        if file.complete:
            return
        progress(label, 0)
        try:
            with ExitStack() as stack:
                prepare, session = self._open(cell, stack)
                for batch in file.remaining:
                    started = time.perf_counter()
                    records = self._run_batch(batch, prepare(batch), session)
                    file.append(records)
                    self._log_time(file, batch, time.perf_counter() - started)
                    progress(label, len(batch))
        except (BudgetError, UnsupportedStageError) as error:
            if isinstance(error, BudgetError) and error.floor is None:
                raise
            details = {"floor": error.floor} if isinstance(error, BudgetError) else {}
            file.end(UNDER_FLOOR if details else UNSUPPORTED, reason=str(error), **details)
            progress(label, len(self.examples))

    def _open(self, cell: Cell, stack: ExitStack) -> tuple[Callable[[range], Mapping[str, Any]], Any]:
        """What makes the cell's inputs of a batch, and the session it runs in; closed with `stack`.

        The full model and what is downsampled run in a session that prunes nothing, for its measurements.
        """
        prepare: Callable[[range], Mapping[str, Any]] = self.inputs
        if cell.method == "downsample":
            smaller = self._downsampled(cell.keep_ratio, stack)

            def prepare(batch: range) -> Mapping[str, Any]:
                return smaller.inputs(*self._asked(batch))

        if cell.method in ("full", "downsample"):
            session = vtprune.prune(self.model, _NOTHING_PRUNED)
        elif cell.method == "zero":
            session = vtprune.prune(self.model, "zero")
        else:
            session = vtprune.prune(self.model, cell.spec, keep_ratio=cell.keep_ratio)
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

    def _log_time(self, file: CellFile, batch: range, seconds: float) -> None:
        line = {"cell": file.path.stem, "first": batch.start, "examples": len(batch), "seconds": round(seconds, 4)}
        with (self.config.output / "timings.jsonl").open("ab") as timings:
            timings.write(to_line(line))
