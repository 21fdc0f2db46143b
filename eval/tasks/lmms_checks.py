# SPDX-License-Identifier: Apache-2.0
"""Tasks of lmms-eval that `vtprune eval` cannot score, found in their configs before data and models are loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

from vtprune.errors import ConfigError

OUTPUT_TYPES = ("generate_until", "multiple_choice", "loglikelihood")

_JUDGES = ("lmms_eval.llm_judge", "lmms_eval.verifiers.openai", "openai", "anthropic", "requests", "httpx")
"""Modules with which a task asks another model."""
_KEYS = re.compile(r"API_KEY|API_URL|api\.openai\.com")
_EXPORT = "run `python -m lmms_eval --model vtprune ... --tasks"


def submits(metric: Mapping[str, Any]) -> bool:
    """Whether a metric of a task's list writes a file for a benchmark's server instead of giving a number."""
    aggregation = metric.get("aggregation")
    names = f"{metric['metric']} {getattr(aggregation, '__name__', aggregation)}"
    return "submission" in names.lower()


def refuse_unscorable(name: str, config: Mapping[str, Any], judge: str | None) -> None:
    """
    Args:
        name: of the task.
        config: its config, with functions.
        judge: what `configs/lmms/suites.yaml` says about it: "none", "fallback" or "yes". None if the task is not
            there; then the functions that score are searched for one.

    Raises:
        ConfigError: it has rounds, repeats, few-shot examples or no media, needs a judge, or hides its answers.
    """
    kind = config.get("output_type", "generate_until")
    if kind not in OUTPUT_TYPES:
        raise ConfigError(f"lmms:{name}: output type {kind!r} is not supported; expected {', '.join(OUTPUT_TYPES)}")
    if (config.get("repeats") or 1) > 1:
        raise ConfigError(f"lmms:{name}: every document is asked {config['repeats']} times, which is not supported")
    if config.get("num_fewshot"):
        raise ConfigError(f"lmms:{name}: prompts with examples (num_fewshot) are not supported")
    metrics = config.get("metric_list") or []
    if metrics and all(map(submits, metrics)):
        raise ConfigError(
            f"lmms:{name}: its answers are hidden, so it has no score here; {_EXPORT} {name} --output_path OUT`, "
            "which writes the file for the benchmark's server"
        )
    functions = [config.get("process_results"), *(m.get("aggregation") for m in metrics if not submits(m))]
    if judge in ("fallback", "yes") or (judge is None and asks_a_judge(filter(callable, functions))):
        raise ConfigError(
            f"lmms:{name}: needs a judge, another model that scores the answers; {_EXPORT} {name} --predict_only "
            "--log_samples --output_path OUT`, which writes the answers"
        )


def asks_a_judge(functions: Iterable[Callable]) -> bool:
    """Whether functions of a task reach code that asks another model, by the names that they use."""
    seen: set[int] = set()
    waiting: list[Any] = list(functions)
    while waiting:
        thing = waiting.pop()
        function = getattr(thing, "__func__", getattr(thing, "func", thing))  # of a method, of a partial
        if not isinstance(function, FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        names = set(_names(function.__code__))
        if any(_KEYS.search(name) or _is_judge(name) for name in names):
            return True
        for name in names & function.__globals__.keys():
            used = function.__globals__[name]
            if _is_judge(used.__name__ if isinstance(used, ModuleType) else getattr(used, "__module__", None) or ""):
                return True
            waiting += _own(used, names, function.__module__)
    return False


def _is_judge(module: str) -> bool:
    return any(module == judge or module.startswith(f"{judge}.") for judge in _JUDGES)


def _names(code: CodeType) -> Iterator[str]:
    """Names and texts in a function and in the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _names(constant)


def _own(used: Any, names: set[str], module: str) -> list[Any]:
    """What a function calls of a task's own code: functions, and methods with names that it uses."""
    if isinstance(used, FunctionType):
        return [used] if used.__module__ == module or used.__module__.startswith("lmms_eval.tasks") else []
    kind = used if isinstance(used, type) else type(used)
    if not (kind.__module__ == module or kind.__module__.startswith("lmms_eval.tasks")):
        return []
    return [value for name, value in vars(kind).items() if name in names or isinstance(used, type)]
