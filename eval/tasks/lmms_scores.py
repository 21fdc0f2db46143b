# SPDX-License-Identifier: Apache-2.0
"""Scores of lmms-eval's tasks: its filters, its `process_results`, its metrics with their aggregation.

Records of examples keep what `process_results` gave, so that the metrics of a cell come from its records alone.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from vtprune.errors import ConfigError
from vtprune.eval.results.statistics import resampled_means
from vtprune.eval.tasks.lmms_checks import submits

Results = dict[str, dict[str, Any]]
"""Name of a filter -> metric -> what `process_results` gave for one document; plain JSON."""

RESAMPLES = 500
"""Fewer than for means, because the metric is aggregated anew for each."""
_PAIRED = "question_id"
"""Items of a metric with the same value of this key belong together, like the two questions about a picture of MME."""


class Scores:
    """The metrics of a task.

    Args:
        task: task object of lmms-eval.
        metric: the one that papers report; default the first of the task's list of which more is better.
    """

    def __init__(self, task: Any, metric: str | None = None):
        from lmms_eval.api.reasoning import parse_reasoning_tags_config
        from lmms_eval.filters.transformation import StripThinkingFilter

        self._task = task
        listed = {entry["metric"]: entry for entry in task.config.metric_list or []}
        self._metrics = [name for name in task.aggregation() if name not in listed or not submits(listed[name])]
        better = task.higher_is_better()
        self._metrics.sort(key=lambda name: (name != metric, not better.get(name, True)))
        self._reasoning = parse_reasoning_tags_config(task_value=task.config.reasoning_tags)
        if task.config.auto_strip_thinking and self._reasoning is None:  # as `lmms_eval.evaluator.evaluate` does
            for ensemble in task._filters:
                ensemble.filters.insert(0, StripThinkingFilter())

    def process(self, document: Mapping[str, Any], requests: Sequence[Any]) -> Results:
        """What the task makes of the answers to one document.

        Args:
            document: without its images, as lmms-eval gives it.
            requests: `Instance`s of the document, with the answers as their `resps`.

        Raises:
            ConfigError: the task's code fails, or gives what JSON cannot hold.
        """
        from lmms_eval.evaluator import _process_document_results

        found = {}
        for ensemble in self._task._filters:
            ensemble.apply(list(requests), [document] * len(requests))
            item = (requests[0].doc_id, document, list(requests))
            with silent(), self._errors("process_results"):
                done = _process_document_results(
                    item, task=self._task, filter_key=ensemble.name, reasoning_tags=self._reasoning, log_samples=False
                )
            found[ensemble.name] = {
                metric: self._plain(metric, value) for metric, value in done.metrics.items() if metric in self._metrics
            }
        return found

    def of_document(self, results: Results) -> float:
        """The score of one document: the value of the main metric, or of the first that the document has.

        If the value is no number, it is the `score` in it, or what the metric's aggregation says of this document.
        """
        first = next(iter(results.values()))
        for metric in (name for name in self._metrics if name in first):
            value = first[metric]
            if isinstance(value, dict):
                value = value.get(self._task.config.score_key, value)
            if not isinstance(value, int | float):
                value = self._aggregate(metric)([first[metric]])
            if isinstance(value, int | float):
                return float(value)
        raise ConfigError(
            f"lmms:{self._task.task_name}: process_results gives no number for a document; it gives "
            f"{', '.join(first) or 'nothing'}, and the metrics are {', '.join(self._metrics)}"
        )

    def aggregated(self, results: Sequence[Results]) -> dict[str, float]:
        """Metric -> its value over these documents, the main one first.

        A metric of a filter other than `none` is named `metric,filter`, as in lmms-eval. Raises ConfigError if no
        metric is a number.
        """
        found = {}
        for metric, name, items in self._items(results):
            value = self._aggregate(metric)(items)
            if isinstance(value, int | float) and math.isfinite(value):
                found[name] = float(value)
        if not found:
            raise ConfigError(f"lmms:{self._task.task_name}: no metric is a number over {len(results)} documents")
        return found

    def draws(self, results: Sequence[Results], name: str) -> np.ndarray | None:
        """Values of a metric of `aggregated` on resampled documents, the same ones for every cell.

        Documents that belong together are drawn together. None if the metric cannot be computed on drawn documents.
        """
        metric, items = next((metric, items) for metric, known, items in self._items(results) if known == name)
        aggregation = self._task.aggregation()[metric]
        if aggregation.__name__ == "mean" and all(isinstance(item, int | float) for item in items):
            return resampled_means(np.asarray(items, dtype=float)[:, None])[:, 0]
        if "args" in inspect.signature(aggregation).parameters:
            return None  # it writes a file every time
        with silent():
            try:
                return _draws(aggregation, items)
            except Exception:  # of the task's code, which may need every document
                return None

    def _items(self, results: Sequence[Results]) -> Iterator[tuple[str, str, list[Any]]]:
        """(metric, its name in results, its values of all documents that have one), the main metric first."""
        for metric in self._metrics:
            for ensemble in self._task._filters:
                found = [one[ensemble.name][metric] for one in results if metric in one[ensemble.name]]
                if found:
                    yield metric, metric if ensemble.name == "none" else f"{metric},{ensemble.name}", found

    def _aggregate(self, metric: str) -> Callable[[list[Any]], Any]:
        """The aggregation of a metric, without what it prints and the files that it writes."""
        aggregation = self._task.aggregation()[metric]

        def call(items: list[Any]) -> Any:
            with silent(), TemporaryDirectory() as folder, self._errors(f"the aggregation of {metric}"):
                options = {}
                if "args" in inspect.signature(aggregation).parameters:
                    options["args"] = argparse.Namespace(output_path=folder)
                return _number(aggregation(copy.deepcopy(items), **options))

        return call

    def _plain(self, metric: str, value: Any) -> Any:
        """`value` in JSON types; tuples become lists."""
        value = _number(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"lmms:{self._task.task_name}: {metric} of a document is {value}")
        if value is None or isinstance(value, str | int | float):
            return value
        if isinstance(value, list | tuple | np.ndarray):
            return [self._plain(metric, item) for item in value]
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {key: self._plain(metric, item) for key, item in value.items()}
        raise ConfigError(
            f"lmms:{self._task.task_name}: process_results gives {type(value).__name__} for {metric}, which results "
            "cannot hold; expected numbers, texts, lists, and mappings with texts as keys"
        )

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """ConfigError for what the task's code raises, also inside lmms-eval's retries."""
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            cause = cause_of(error)
            raise ConfigError(f"lmms:{self._task.task_name}: {what} fails: {type(cause).__name__}: {cause}") from cause


def cause_of(error: Exception) -> BaseException:
    """What failed inside lmms-eval's retries, which hide it."""
    from tenacity import RetryError

    cause = error.last_attempt.exception() if isinstance(error, RetryError) else None
    return cause or error


def _draws(aggregation: Callable, items: list[Any]) -> np.ndarray | None:
    groups: dict[Any, list[Any]] = {}
    for place, item in enumerate(items):
        key = item.get(_PAIRED, place) if isinstance(item, dict) else place
        groups.setdefault(str(key), []).append(item)
    rng = np.random.default_rng(0)
    values = []
    together = list(groups.values())
    if len(together) < len(items):  # a group that is drawn twice stays two groups
        alone = float(aggregation(_renamed(together)))
        if not math.isclose(alone, float(aggregation(copy.deepcopy(items))), rel_tol=1e-9):
            return None  # the key says more than which items belong together
    for _ in range(RESAMPLES):
        drawn = [together[place] for place in rng.integers(0, len(together), size=len(together))]
        if len(together) < len(items):
            values.append(float(aggregation(_renamed(drawn))))
        else:
            values.append(float(aggregation([dict(one) if isinstance(one, dict) else one for (one,) in drawn])))
    found = np.asarray(values)
    return found if np.isfinite(found).all() else None


def _renamed(groups: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Items of drawn groups, each group with an identifier of its own."""
    return [{**item, _PAIRED: f"{item[_PAIRED]} {place}"} for place, group in enumerate(groups) for item in group]


def _number(value: Any) -> Any:
    """NumPy's numbers and truth values as Python's."""
    if isinstance(value, np.generic):
        value = value.item()
    return int(value) if isinstance(value, bool) else value


@contextmanager
def silent() -> Iterator[None]:
    """Nothing that lmms-eval and its tasks print or log is shown. They do so for every call."""
    from loguru import logger

    logger.disable("")
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logger.enable("")
