# SPDX-License-Identifier: Apache-2.0
"""`summary.md`: all tables of a run, from the lines of `results.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean

from vtprune.eval.results import explanations as explain
from vtprune.eval.results.entries import Entry, conditions, ratios, rows, studies
from vtprune.eval.results.formatting import (
    MISSING,
    accuracy,
    cost,
    flops,
    gain,
    hard,
    latency,
    loyalty,
    milliseconds,
    percent,
    retention,
    tokens,
    tokens_per_correct,
)
from vtprune.eval.results.reasons import Reasons
from vtprune.eval.results.records import Record
from vtprune.eval.results.terms import ACCURACY, Terms, terms
from vtprune.eval.results.timings import Latency

Times = Mapping[str, Latency]
"""Name of a cell -> its latency."""
Shown = Callable[[Entry], str]
"""Writes a row with numbers."""


def _markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def budget_table(results: Sequence[Record], show: Shown, refused: Shown | None = None) -> str:
    """Markdown table of methods by budgets.

    Args:
        results: lines of `results.jsonl` of one model on one task.
        show: writes a row with numbers.
        refused: writes one without; default its status.
    """

    def place(entry: Entry | None) -> str:
        if entry is None:
            return MISSING
        return show(entry) if entry.ok else f"*{refused(entry) if refused else entry.status}*"

    columns = ratios(results)
    body = []
    for label, by_ratio in rows(results).items():
        if set(by_ratio) & set(columns):
            cells = [by_ratio.get(ratio) for ratio in columns]
        else:
            cells = [next(iter(by_ratio.values()))] + [None] * (len(columns) - 1)
        body.append([label, *map(place, cells)])
    return _markdown_table(["method", *(f"{100 * ratio:g} %" for ratio in columns)], body)


def _by_family(results: Sequence[Record], ratio: float) -> str:
    families = list(results[0]["family_scores"])
    body = []
    for label, by_ratio in rows(results).items():
        entry = by_ratio.get(ratio) or next((by_ratio[alone] for alone in (1.0, 0.0, None) if alone in by_ratio), None)
        if entry is None or not entry.ok:
            continue
        body.append([label, *(percent(entry.family(f)) for f in families)])
    return _markdown_table(["method", *families], body)


def _published(results: Sequence[Record]) -> str:
    """Markdown table of the published settings: our number beside the paper's."""
    body = []
    for label, by_ratio in rows(results).items():
        entry = next(iter(by_ratio.values()))
        if not (given := entry.cells[0].get("published")):
            continue
        ours = entry.mean("retention" if given["metric"] == "retention" else "score") if entry.ok else None
        apart = MISSING if ours is None else f"{100 * (ours - given['value']):+.1f}"
        where = f"{given['source']}, {given['table']}"
        body.append([label, given["metric"], percent(ours), percent(given["value"]), apart, given["benchmarks"], where])
    return _markdown_table(["setting", "in %", "ours", "theirs", "difference", "theirs is of", "source"], body)


def summary_markdown(results: Sequence[Record], times: Times) -> str:
    """All tables of every model on every task, with notes on how to read them, and the provenance."""
    parts = [_study_markdown(study, suffix, times) for suffix, study in studies(results).items()]
    if terms(results).classifies and len({line["task"] for line in results}) > 1:
        models = dict.fromkeys((line["model"], conditions(line)) for line in results)
        lines = [[line for line in results if (line["model"], conditions(line)) == model] for model in models]
        tables = [
            f"# All tasks: {own[0]['model']}{conditions(own[0])}\n\n{explain.ON_ALL_TASKS}\n\n{tasks_table(own, times)}"
            for own in lines
        ]
        parts = tables + parts
    return "\n\n".join(parts) + "\n"


def tasks_table(results: Sequence[Record], times: Times) -> str:
    """Markdown table of rows and budgets by tasks, with FLOPs and images in a second.

    results: of one model on classification tasks, under one value of each axis.
    """
    by_task = {study[0]["task"]: rows(study) for study in studies(results).values()}
    first, *_ = by_task.values()
    (full,) = first["full"].values()
    key = terms(results).flops
    full_speed = _mean([_speed(entry, times) for found in by_task.values() for entry in found["full"].values()])
    body = []
    for label, ratio in ((label, ratio) for label, by_ratio in first.items() for ratio in by_ratio):
        entries = [found[label][ratio] for found in by_task.values()]
        line = [label, MISSING if ratio in (None, 1.0) else f"{100 * ratio:g} %"]
        if entries[0].ok:
            spent = mean(entry.mean(key) for entry in entries)
            fast = _relative(_mean([_speed(entry, times) for entry in entries]), full_speed)
            line += [f"{entries[0].mean('final_tokens'):.0f}", f"{flops(spent)} ({spent / full.mean(key):.2f})", fast]
        else:
            line += [MISSING] * 3
        body.append(line + [percent(entry.mean("score")) if entry.ok else f"*{entry.status}*" for entry in entries])
    return _markdown_table(["method", "asked", "patches left", "encoder, one image", "images/s", *by_task], body)


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else mean(values)


def _speed(entry: Entry, times: Times) -> float | None:
    found = latency(entry, times)
    return None if found is None else found.per_second


def _relative(per_second: float | None, full: float | None) -> str:
    """Images in a second, and how many times those of the full model."""
    if per_second is None:
        return MISSING
    return f"{per_second:.0f}" + ("" if full is None else f" ({per_second / full:.2f})")


def _latency(entry: Entry, times: Times) -> str:
    """Milliseconds of one example: prefill, and the whole answer."""
    found = latency(entry, times)
    return MISSING if found is None else f"{milliseconds(found.prefill)} / {milliseconds(found.whole)}"


def _quantities(results: Sequence[Record], words: Terms, times: Times) -> Iterator[tuple[str, str, Shown]]:
    """Title, explanation and the text of a row, of each table of methods by budgets."""
    on_tokens, on_cost = (
        (explain.ON_PATCHES, explain.ON_ENCODER_COST) if words.classifies else (explain.ON_TOKENS, explain.ON_COST)
    )
    on_score, title = explain.ON_ACCURACY, "Accuracy"
    if words.score != ACCURACY:
        on_score, title = explain.ON_METRIC.format(scored=words.scored), words.scored
    yield title, on_score + (explain.ON_FULL if words.classifies else explain.ON_BASELINES), accuracy
    yield "Retention", explain.ON_RETENTION, retention
    if any(line["hard_score"] is not None or line["gain"] is not None for line in results):
        of = "" if words.score == ACCURACY else explain.OF_DOCUMENTS
        yield "Gain over the smaller image", of + explain.ON_GAIN, gain
        yield "Questions that the smaller image gets wrong", of + explain.ON_HARD, hard
    yield "Loyalty", explain.ON_LOYALTY, loyalty
    yield f"{words.tokens.capitalize()}, measured", on_tokens, tokens
    yield f"{words.tokens.capitalize()} per right answer", explain.ON_PER_CORRECT, tokens_per_correct
    yield "Encoder cost" if words.classifies else "Prefill cost", on_cost, cost
    if words.classifies:
        full = _speed(*rows(results)["full"].values(), times)
        yield "Images in a second", explain.ON_SPEED, lambda entry: _relative(_speed(entry, times), full)
    else:
        yield "Latency", explain.ON_LATENCY, lambda entry: _latency(entry, times)


def _study_markdown(results: Sequence[Record], suffix: str, times: Times) -> str:
    first, words, reasons = results[0], terms(results), Reasons(results)
    parts = [
        f"# {first['task']}: {first['model']}{conditions(first)}, {first['n']} examples",
        f"![accuracy against {words.tokens}, FLOPs and latency](pareto{suffix}.png)",
    ]
    for title, explanation, show in _quantities(results, words, times):
        parts += [f"## {title}", explanation, budget_table(results, show, reasons.of)]
    if reasons.texts:
        notes = [f"- [{number}] {text}" for number, text in enumerate(reasons.texts, start=1)]
        parts += ["## Rows without numbers", "\n".join(notes)]
    parts += [
        f"## By {words.kind}",
        explain.ON_FAMILIES.format(kind=words.kind),
        f"![{words.score} by {words.kind}](families{suffix}.png)",
    ]
    for ratio in ratios(results):
        parts += [f"### {100 * ratio:g} % kept", _by_family(results, ratio)]
    if any(record.get("published") for record in results):
        parts += ["## Published settings", explain.ON_PUBLISHED, _published(results)]
    parts += [
        "## Provenance",
        _markdown_table(
            ["what", "version"],
            [*map(list, first["versions"].items()), ["fingerprint of the weights", first["weights"]]],
        ),
        "Configuration, defaults filled in:",
        f"```json\n{json.dumps(first['config'], indent=2)}\n```",
    ]
    return "\n\n".join(parts)
