# SPDX-License-Identifier: Apache-2.0
"""Runs the grid: loads each model once and runs every cell batch by batch; a killed run goes on where it stopped."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count, groupby
from pathlib import Path
from typing import Any

from rich.console import Console

from vtprune.errors import ConfigError
from vtprune.eval.config import EvalConfig
from vtprune.eval.inputs import resolve_model
from vtprune.eval.progress import progress_bar, say
from vtprune.eval.results.records import (
    CellFile,
    CellPart,
    Record,
    cell_name,
    cell_path,
    cut_off_torn,
    part_path,
    to_line,
    write_atomically,
    writing,
)
from vtprune.eval.running.cell_log import CellLog
from vtprune.eval.running.cells import Cell, Identity, expand
from vtprune.eval.running.classifiers import ClassifierEvaluator
from vtprune.eval.running.devices import place_of, taken, with_devices
from vtprune.eval.running.evaluator import Evaluator, refuse_mismatches
from vtprune.eval.running.lmms import LmmsEvaluator
from vtprune.eval.running.measure import Outcome, StudyPlan
from vtprune.eval.running.processes import Processes
from vtprune.eval.running.questions import QuestionEvaluator
from vtprune.eval.running.shards import Shard, claim
from vtprune.eval.running.unfinished import write_plan
from vtprune.eval.tasks import AnyTask, Classification, Example, open_tasks
from vtprune.eval.tasks.lmms_tasks import LmmsTask


def run(config: EvalConfig, console: Console | None = None, shard: Shard | None = None) -> list[Record]:
    """Runs every cell that is not in `config.output` yet; writes `results.jsonl`, `summary.md` and plots there.

    If `torchrun` starts several processes, they share the batches of every cell. The results are those of one process.

    Args:
        config: what to run, from `load_config`.
        console: where it says what it takes, and how far it is; default nowhere.
        shard: the share of the batches that is run; default all. Then no results are written, for others have the rest.

    Returns:
        The lines of `results.jsonl`, in the order of the configuration. Only the first process returns any, and no
        shard does.

    Raises:
        ConfigError: a model or a task cannot be loaded, they do not go together, a package is missing, a device is not
            there, or another run uses the output folder.
        VTPruneError: the results cannot be written.
    """
    config = with_devices(config)
    tasks = open_tasks(config.task, config.include_path)
    video = ["av"] if any(task.kind == "video" for task in tasks.values()) else []
    for module in ("matplotlib", "numpy", "filelock", *video):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f'evaluation needs {module}: pip install "vtprune[eval]"')
    refuse_mismatches(config, tasks)
    processes = Processes.start(config)
    if shard is not None and processes.count > 1:
        raise ConfigError(f"--shard {shard}: {processes.count} processes share a run already; start one")
    if not processes.first:
        console = None
    with ExitStack() as stack:
        if processes.first:
            claim(config.output, shard, stack)
        opened = [Opened.of(task, config.limit) for task in tasks.values()]
        studies = [
            Study.of(own, model, each, axes)
            for model in config.model
            for axes, own in config.combinations()
            for each in opened
        ]
        if processes.first:
            say(console, taken(config) + ("" if shard is None else f"; shard {shard}"))
        results = _run(config, studies, processes, shard, console)
    processes.end()
    return results


@dataclass(frozen=True)
class Opened:
    """A task and its examples, which are opened once for all studies."""

    task: AnyTask
    examples: list[Example]
    digests: list[str]
    """of the examples; none if they follow from the source code"""

    @classmethod
    def of(cls, task: AnyTask, limit: int | None) -> Opened:
        """Raises ConfigError if the examples have mistakes, or cannot be scored."""
        examples = list(task.examples(limit))
        digests = task.digests(examples)
        task.rehearse(examples)
        return cls(task, examples, digests)


@dataclass
class Study:
    """One model on one task under one value of each axis: the cells, and the examples that all of them run over."""

    config: EvalConfig
    """with a single value of each axis"""
    axes: dict[str, str]
    """the values of the axes that have several"""
    model: str
    task: AnyTask
    identity: Identity
    cells: list[Cell]
    paths: list[Path]
    examples: list[Example]
    digests: list[str]
    """of the examples; none if they follow from the source code"""
    batches: list[range]
    files: list[CellFile] = field(default_factory=list)
    """of the cells; only the first process has them"""
    remaining: list[list[range]] = field(default_factory=list)
    """the batches of each cell that still have to run; of a shard, those that are its own"""

    @classmethod
    def of(cls, config: EvalConfig, model: str, opened: Opened, axes: dict[str, str] | None = None) -> Study:
        task, examples, digests = opened.task, opened.examples, opened.digests
        cells = expand(config)
        identity = Identity.of(config, task, digests, resolve_model(model))
        paths = [cell_path(config.output, cell.title, identity.key(cell)) for cell in cells]
        starts = range(0, len(examples), config.batch_size)
        batches = [range(start, min(start + config.batch_size, len(examples))) for start in starts]
        return cls(config, axes or {}, model, task, identity, cells, paths, examples, digests, batches)

    def named(self, cell: Cell) -> str:
        """A cell's name for people, among those of all studies."""
        return f"{', '.join((self.task.name, self.model, *self.axes.values()))}: {cell.title}"

    def open(self, processes: Processes) -> None:
        """Reads what earlier runs left of each cell."""
        # Only the first process reads and tidies these files. No process writes before that is done.
        if processes.first:
            self.files = [CellFile(path, self.batches) for path in self.paths]
        self.remaining = processes.share([file.remaining for file in self.files])

    def open_shard(self, shard: Shard, numbers: Iterator[int]) -> None:
        """Reads what there is of each cell, while other shards may add to it.

        numbers: those of the batches, through all studies of the run.
        """
        for path in self.paths:
            cut_off_torn(part_path(path, shard.name))
            own = [batch for batch in self.batches if shard.takes(next(numbers))]
            done = CellFile(path, self.batches, shared=True)
            self.remaining.append([batch for batch in own if batch in done.remaining])

    def run(self, evaluator: Evaluator, processes: Processes, shard: Shard | None, watch: Watch) -> None:
        """Runs this process's share of the remaining batches, cell by cell."""
        for place, (cell, batches) in enumerate(zip(self.cells, self.remaining, strict=True)):
            if not batches:
                watch.log.skip()
                continue
            watch.log.begin(self.named(cell), sum(map(len, batches)))
            part = CellPart(self.paths[place], processes.index if shard is None else shard.name)
            # The batches are those of a single process, so that the padding of an example stays the same.
            evaluator.run_cell(cell, batches[processes.index :: processes.count], part, watch.progress)
            parts = processes.gather(part)
            watch.progress(cell.title, sum(map(len, batches)) - part.examples)
            if processes.first:
                file = self._closed(place, parts) if shard is None else self._closed_by_shard(place, part)
                watch.log.end(self.named(cell), sum(other.examples for other in parts), file)

    def _closed(self, place: int, parts: list[CellPart]) -> CellFile:
        self.files[place].finish(parts)
        return self.files[place]

    def _closed_by_shard(self, place: int, part: CellPart) -> CellFile:
        """The cell, which is finished if no shard has any batch of it left, or if it cannot run."""
        file = CellFile(self.paths[place], self.batches, shared=True)
        if part.ending is not None:
            file.finish([part])
        return file

    def plan(self) -> StudyPlan:
        """What is known of the lines of the cells before they have run."""
        cells = [(cell, cell_name(path)) for cell, path in zip(self.cells, self.paths, strict=True)]
        return StudyPlan.of(self.config, self.model, self.task, self.identity, len(self.examples), cells, self.axes)

    def results(self) -> list[Record]:
        """The lines of the finished cells."""
        outcomes = [Outcome(file.records, file.ending) for file in self.files]
        return self.plan().lines(outcomes, self.task.metrics)


@dataclass(frozen=True)
class Watch:
    """What people see of a run while it lasts."""

    progress: Callable[[str, int], None]
    """of a bar: what runs now, and how many examples more are done"""
    log: CellLog
    console: Console | None


def _run(
    config: EvalConfig, studies: Sequence[Study], processes: Processes, shard: Shard | None, console: Console | None
) -> list[Record]:
    numbers = count()
    for study in studies:
        if shard is None:
            study.open(processes)
        else:
            study.open_shard(shard, numbers)
    if processes.first:
        write_plan(config.output, [study.plan() for study in studies])
    remaining = sum(len(batch) for study in studies for batches in study.remaining for batch in batches)
    total = sum(len(study.examples) * len(study.cells) for study in studies) if shard is None else remaining
    log = CellLog(console, sum(len(study.cells) for study in studies))
    on_terminal = console if console is not None and console.is_terminal else None
    with progress_bar(on_terminal, "loading the model", total, total - remaining) as bar:
        watch = Watch(bar.advance, log, console)
        # Studies of one model under the same axes come one after another.
        for _, group in groupby(studies, lambda study: (study.model, study.axes)):
            _run_model(list(group), processes, shard, watch)
    if shard is not None:
        done = [path.exists() for study in studies for path in study.paths]
        say(console, f"shard {shard} is done; {sum(done)} of {len(done)} cells are finished")
        say(console, "when all shards are done, the same command without --shard writes the results")
    if shard is not None or not processes.first:
        return []
    results = [line for study in studies for line in study.results()]
    write_atomically(config.output / "results.jsonl", b"".join(map(to_line, results)))
    _summarise(results, config.output)
    return results


def _run_model(studies: Sequence[Study], processes: Processes, shard: Shard | None, watch: Watch) -> None:
    """Runs studies of one model under the same axes. The model is loaded once, if any of them needs it."""
    loaded = None
    for study in studies:
        if not any(study.remaining):
            watch.log.skip(len(study.cells))
            continue
        kind = evaluator_class(study.task)
        loaded = loaded or _load(kind, study, processes, watch)
        evaluator = kind(study.config, study, loaded)
        if processes.first:
            evaluator.write_views()
        study.run(evaluator, processes, shard, watch)


def evaluator_class(task: AnyTask) -> type[Evaluator]:
    """What runs the cells of a task."""
    if isinstance(task, Classification):
        return ClassifierEvaluator
    return LmmsEvaluator if isinstance(task, LmmsTask) else QuestionEvaluator


def _load(kind: type[Evaluator], study: Study, processes: Processes, watch: Watch) -> Any:
    config = study.config
    gc.collect()  # the model before it is part of cycles, and its memory is needed
    # `load` takes "auto" as: over all accelerators.
    loaded = kind.load(config, study.model, config.device_map or processes.device or config.device)
    if config.device_map is not None:
        say(watch.console, f"{study.model} on {place_of(loaded[0])}")
    return loaded


def _summarise(results: Sequence[Record], output: Path) -> None:
    from vtprune.eval.pages.plots import families, pareto
    from vtprune.eval.results.entries import studies
    from vtprune.eval.results.summary import summary_markdown
    from vtprune.eval.results.timings import latencies

    times = latencies([output])
    write_atomically(output / "summary.md", summary_markdown(results, times).encode())
    with writing(output):
        for suffix, study in studies(results).items():
            pareto(study, output / f"pareto{suffix}.png", times)
            families(study, output / f"families{suffix}.png")
