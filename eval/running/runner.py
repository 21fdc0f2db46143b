# SPDX-License-Identifier: Apache-2.0
"""Runs the grid: loads each model once and runs every cell batch by batch; a killed run goes on where it stopped."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from vtprune.errors import ConfigError
from vtprune.eval.config import EvalConfig
from vtprune.eval.inputs import resolve_model
from vtprune.eval.progress import progress_bar
from vtprune.eval.results.records import CellFile, CellPart, Record, cell_path, to_line, write_atomically, writing
from vtprune.eval.running.cells import Cell, Identity, expand
from vtprune.eval.running.classifiers import ClassifierEvaluator
from vtprune.eval.running.evaluator import Evaluator, refuse_mismatches
from vtprune.eval.running.lmms import LmmsEvaluator
from vtprune.eval.running.measure import result_lines
from vtprune.eval.running.processes import Processes
from vtprune.eval.running.questions import QuestionEvaluator
from vtprune.eval.tasks import AnyTask, Classification, Example, open_tasks
from vtprune.eval.tasks.lmms_tasks import LmmsTask


def run(config: EvalConfig, console: Console | None = None) -> list[Record]:
    """Runs every cell that is not in `config.output` yet; writes `results.jsonl`, `summary.md` and plots there.

    If `torchrun` starts several processes, they share the batches of every cell. The results are those of one process.

    Args:
        config: what to run, from `load_config`.
        console: where the progress bar goes; default none.

    Returns:
        The lines of `results.jsonl`, in the order of the configuration. Only the first process returns any.

    Raises:
        ConfigError: a model or a task cannot be loaded, they do not go together, a package is missing, or another run
            uses the output folder.
        VTPruneError: the results cannot be written.
    """
    tasks = open_tasks(config.task, config.include_path)
    video = ["av"] if any(task.kind == "video" for task in tasks.values()) else []
    for module in ("matplotlib", "numpy", "filelock", *video):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f'evaluation needs {module}: pip install "vtprune[eval]"')
    refuse_mismatches(config, tasks)
    processes = Processes.start(config.device)
    with ExitStack() as stack:
        if processes.first:
            _claim(config.output, stack)
        studies = [Study.of(config, model, task) for model in config.model for task in tasks.values()]
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
    """the batches of each cell that still have to run"""

    @classmethod
    def of(cls, config: EvalConfig, model: str, task: AnyTask) -> Study:
        cells = expand(config)
        examples = list(task.examples(config.limit))
        digests = task.digests(examples)
        if isinstance(task, LmmsTask):
            task.rehearse(examples)
        identity = Identity.of(config, task, digests, resolve_model(model))
        paths = [cell_path(config.output, cell.title, identity.key(cell)) for cell in cells]
        starts = range(0, len(examples), config.batch_size)
        batches = [range(start, min(start + config.batch_size, len(examples))) for start in starts]
        return cls(model, task, identity, cells, paths, examples, digests, batches)

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
        return result_lines(config, self.model, self.task, self.identity, cells)


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
    classifies = isinstance(studies[0].task, Classification)
    kind: type[Evaluator] = ClassifierEvaluator if classifies else QuestionEvaluator
    loaded = kind.load(config, studies[0].model, processes.device)
    for study in studies:
        evaluator = (LmmsEvaluator if isinstance(study.task, LmmsTask) else kind)(config, study, loaded)
        if processes.first:
            evaluator.write_views()
        study.run(evaluator, processes, progress)


def _summarise(results: Sequence[Record], output: Path) -> None:
    from vtprune.eval.pages.plots import families, pareto
    from vtprune.eval.results.entries import studies
    from vtprune.eval.results.summary import summary_markdown
    from vtprune.eval.results.timings import examples_per_second

    write_atomically(output / "summary.md", summary_markdown(results, examples_per_second([output])).encode())
    with writing(output):
        for suffix, study in studies(results).items():
            pareto(study, output / f"pareto{suffix}.png")
            families(study, output / f"families{suffix}.png")
