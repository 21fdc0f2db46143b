# SPDX-License-Identifier: Apache-2.0
"""Tables for people, in the terminal and in `summary.md`, from the lines of `results.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from rich.markup import escape
from rich.table import Table

from vtprune.eval.results.entries import Entry, ratios, rows, studies
from vtprune.eval.results.formatting import MISSING, accuracy, bounds, flops, percent
from vtprune.eval.results.records import Record
from vtprune.eval.results.terms import ACCURACY, terms


def retention(entry: Entry) -> str:
    """Score over the full model's in per cent, with its paired interval; over several seeds the means."""
    if entry.mean("retention") is None:
        return MISSING
    return f"{percent(entry.mean('retention'))}{bounds(entry.retention_interval)}"


def tokens(entry: Entry) -> str:
    """Measured tokens of the last layer, and their share averaged over the layers."""
    return f"{entry.mean('final_tokens'):.1f} ({percent(entry.mean('measured_keep_ratio'))} %)"


def cost(entry: Entry) -> str:
    """FLOPs of one example and their share of the unpruned ones."""
    key = terms(entry.cells).flops
    share = entry.mean(key) / entry.mean(f"unpruned_{key}")
    return f"{flops(entry.mean(key))} ({percent(share)} %)"


def speed(entry: Entry, per_second: Mapping[str, float]) -> float | None:
    """Images in a second, mean over the seeds; None if a cell has no times.

    per_second: name of a cell -> images in a second.
    """
    found = [per_second.get(cell["cell"]) for cell in entry.cells]
    return None if None in found else mean(found)


def terminal_table(results: Sequence[Record]) -> Table:
    """Methods by budgets. Each place has accuracy, retention, measured tokens and FLOPs."""
    first, words = results[0], terms(results)
    table = Table(
        title=f"{first['task']}, {first['model']}, {first['n']} examples",
        caption=f"{words.scored}, ± over seeds; ret: share of the full model's {words.score} in %; "
        f"{words.final}, measured; share of the unpruned {words.flops_name}",
        show_lines=True,
    )
    table.add_column("method", no_wrap=True)
    columns = ratios(results)
    for ratio in columns:
        table.add_column(f"{100 * ratio:g} % kept")
    for label, by_ratio in rows(results).items():
        if set(by_ratio) & set(columns):
            table.add_row(escape(label), *(_place(by_ratio.get(ratio)) for ratio in columns))
        else:  # full, zero, counts and schedules have a single budget
            table.add_row(escape(label), _place(next(iter(by_ratio.values()))))
    return table


def _place(entry: Entry | None) -> str:
    if entry is None:
        return MISSING
    if not entry.ok:
        return f"[dim]{escape(entry.status)}[/dim]"
    spread = "" if entry.spread is None else f" ±{100 * entry.spread:.1f}"
    key = terms(entry.cells).flops
    share = entry.mean(key) / entry.mean(f"unpruned_{key}")
    return (
        f"[bold]{percent(entry.mean('score'))}[/bold]{spread}\n"
        f"ret {percent(entry.mean('retention'))}\n"
        f"[dim]{entry.mean('final_tokens'):.1f} tok {100 * share:.0f}%[/dim]"
    )


def _markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def budget_table(results: Sequence[Record], show: Callable[[Entry], str]) -> str:
    """Markdown table of methods by budgets; `show` writes the entry of a place."""
    columns = ratios(results)
    body = []
    for label, by_ratio in rows(results).items():
        if set(by_ratio) & set(columns):
            cells = [by_ratio.get(ratio) for ratio in columns]
        else:
            cells = [next(iter(by_ratio.values()))] + [None] * (len(columns) - 1)
        body.append([label, *(MISSING if c is None else show(c) if c.ok else f"*{c.status}*" for c in cells)])
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


_ON_ACCURACY = """\
Per cent of the answers that are right, with a 95 % bootstrap interval. Rows with several seeds show their
mean, ± their standard deviation, and the mean interval of one seed. """

_ON_METRIC = """\
The metric of lmms-eval, {scored}, over the documents of the row, with a 95 % bootstrap interval over documents. A row
without an interval has a metric that cannot be computed on drawn documents. Rows with several seeds show their mean,
± their standard deviation, and the mean interval of one seed. """

_ON_BASELINES = """\
`full` and `zero` have no budget and
stand in the first column: all visual tokens, and none (what the question alone gives away). So do rows whose budget
is a count of tokens or their own schedule."""

_ON_FULL = """\
`full` has no budget and stands in the
first column. So do rows whose budget is a count of patches or their own schedule."""

_ON_RETENTION = """\
Accuracy over that of the full model in per cent. The interval is a paired bootstrap over examples: both
models see the same drawn examples, so what makes all of them easy or hard cancels."""

_ON_TOKENS = """\
Visual tokens that enter the last decoder layer, averaged over examples; in brackets the visual tokens
averaged over all layers as a share of the unpruned model's. The columns are the budget *asked for*. A method
that prunes inside the language model keeps everything up to its first pruning layer: a budget it cannot meet
is shown as under its floor, with the floor in brackets. `downsample` can only make grids of whole patches, and of a
video whole frames."""

_ON_COST = """\
FLOPs of the language model's prefill of one example, from the measured tokens of every layer, and their share
of the unpruned model's. Convention `exact` of `vtprune.cost`: two FLOPs per multiply-add, text included,
image encoder and selection not included (`downsample` makes the encoder cheaper as well, no method before the
LLM does). FLOPs are not seconds."""

_ON_PATCHES = """\
Patches that are left behind the last layer of the encoder; in brackets the patches left behind a layer, averaged over
all layers, as a share of the unpruned model's. The columns are the budget *asked for*: the share of the patches left
behind the last layer."""

_ON_ENCODER_COST = """\
FLOPs of the vision encoder for one image, from the measured tokens of every layer, and their share of the unpruned
model's: two FLOPs per multiply-add; the features of the classes, which are computed once, and what a method itself
computes are not included. FLOPs are not seconds."""

_ON_SPEED = """\
Images in a second, and in brackets how many times those of `full`: measured in this run, the median over the batches,
mean over seeds. The time is that of the classifier on preprocessed pixels, with all that the method computes. All rows,
`full` too, run in a session. On a machine that was busy the numbers are smaller, and not equally for all rows."""

_ON_ALL_TASKS = """\
Accuracy in per cent on every task. FLOPs and images in a second are those of one image, means over the tasks; in
brackets, times those of `full`."""

_ON_PUBLISHED = """\
Ours beside what a paper prints for the setting. Its number is of its own benchmarks and model, so the difference says
something only where these are the same."""

_ON_FAMILIES = "Per cent right of each {kind}, mean over seeds; rows without a budget are repeated for comparison."


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


def summary_markdown(results: Sequence[Record], per_second: Mapping[str, float]) -> str:
    """All tables of every model on every task, with notes on how to read them, and the provenance.

    per_second: name of a cell -> examples in a second.
    """
    parts = [_study_markdown(study, suffix, per_second) for suffix, study in studies(results).items()]
    if terms(results).classifies and len({line["task"] for line in results}) > 1:
        models = dict.fromkeys(line["model"] for line in results)
        lines = [[line for line in results if line["model"] == model] for model in models]
        tables = [
            f"# All tasks: {own[0]['model']}\n\n{_ON_ALL_TASKS}\n\n{tasks_table(own, per_second)}" for own in lines
        ]
        parts = tables + parts
    return "\n\n".join(parts) + "\n"


def tasks_table(results: Sequence[Record], per_second: Mapping[str, float]) -> str:
    """Markdown table of rows and budgets by tasks, with FLOPs and images in a second.

    results: of one model on classification tasks. per_second: name of a cell -> images in a second.
    """
    by_task = {study[0]["task"]: rows(study) for study in studies(results).values()}
    first, *_ = by_task.values()
    (full,) = first["full"].values()
    key = terms(results).flops
    full_speed = _mean([speed(entry, per_second) for found in by_task.values() for entry in found["full"].values()])
    body = []
    for label, ratio in ((label, ratio) for label, by_ratio in first.items() for ratio in by_ratio):
        entries = [found[label][ratio] for found in by_task.values()]
        line = [label, MISSING if ratio in (None, 1.0) else f"{100 * ratio:g} %"]
        if entries[0].ok:
            spent = mean(entry.mean(key) for entry in entries)
            fast = _relative(_mean([speed(entry, per_second) for entry in entries]), full_speed)
            line += [f"{entries[0].mean('final_tokens'):.0f}", f"{flops(spent)} ({spent / full.mean(key):.2f})", fast]
        else:
            line += [MISSING] * 3
        body.append(line + [percent(entry.mean("score")) if entry.ok else f"*{entry.status}*" for entry in entries])
    return _markdown_table(["method", "asked", "patches left", "encoder, one image", "images/s", *by_task], body)


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else mean(values)


def _relative(per_second: float | None, full: float | None) -> str:
    """Images in a second, and how many times those of the full model."""
    if per_second is None:
        return MISSING
    return f"{per_second:.0f}" + ("" if full is None else f" ({per_second / full:.2f})")


def _study_markdown(results: Sequence[Record], suffix: str, per_second: Mapping[str, float]) -> str:
    first, words = results[0], terms(results)
    on_tokens, on_cost = (_ON_PATCHES, _ON_ENCODER_COST) if words.classifies else (_ON_TOKENS, _ON_COST)
    on_score = _ON_ACCURACY if words.score == ACCURACY else _ON_METRIC.format(scored=words.scored)
    on_accuracy = on_score + (_ON_FULL if words.classifies else _ON_BASELINES)
    title = "Encoder cost" if words.classifies else "Prefill cost"
    parts = [
        f"# {first['task']}: {first['model']}, {first['n']} examples",
        f"![{words.score} against {words.tokens} and FLOPs](pareto{suffix}.png)",
        "## Accuracy" if words.score == ACCURACY else f"## {words.scored}",
        *(on_accuracy, budget_table(results, accuracy)),
        *("## Retention", _ON_RETENTION, budget_table(results, retention)),
        *(f"## {words.tokens.capitalize()}, measured", on_tokens, budget_table(results, tokens)),
        *(f"## {title}", on_cost, budget_table(results, cost)),
    ]
    if words.classifies:
        full = speed(*rows(results)["full"].values(), per_second)
        shown = budget_table(results, lambda entry: _relative(speed(entry, per_second), full))
        parts += ["## Images in a second", _ON_SPEED, shown]
    parts += [
        f"## By {words.kind}",
        _ON_FAMILIES.format(kind=words.kind),
        f"![{words.score} by {words.kind}](families{suffix}.png)",
    ]
    for ratio in ratios(results):
        parts += [f"### {100 * ratio:g} % kept", _by_family(results, ratio)]
    if any(record.get("published") for record in results):
        parts += ["## Published settings", _ON_PUBLISHED, _published(results)]
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
