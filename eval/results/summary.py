# SPDX-License-Identifier: Apache-2.0
"""The comparison for people: a table in the terminal and `summary.md`, both from the lines of `results.jsonl`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.markup import escape
from rich.table import Table

Record = dict[str, Any]

_MISSING = "–"


@dataclass(frozen=True)
class Entry:
    """One method at one budget: the cells of all its seeds."""

    cells: tuple[Record, ...]

    @property
    def status(self) -> str:
        """ "ok", or why there are no numbers."""
        first = self.cells[0]
        floor = first.get("floor")
        return first["status"] if floor is None else f"{first['status']} ({floor:.1%})"

    @property
    def ok(self) -> bool:
        return self.cells[0]["status"] == "ok"

    def mean(self, key: str) -> float | None:
        """Mean over the seeds; None where a cell has no such number."""
        values = [cell[key] for cell in self.cells]
        return None if None in values else mean(values)

    def family(self, name: str) -> float:
        """Mean score over the seeds in one kind of question."""
        return mean(cell["family_scores"][name] for cell in self.cells)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the score over the seeds, None for a single one."""
        return stdev(cell["score"] for cell in self.cells) if len(self.cells) > 1 else None

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the score; over several seeds the mean of their bounds."""
        return mean(c["ci"][0] for c in self.cells), mean(c["ci"][1] for c in self.cells)


def rows(results: Sequence[Record]) -> dict[str, dict[float, Entry]]:
    """Label of a method -> asked keep ratio -> its cells, in the order of the results."""
    grouped: dict[str, dict[float, list[Record]]] = {}
    for record in results:
        grouped.setdefault(record["label"], {}).setdefault(record["keep_ratio"], []).append(record)
    return {
        label: {ratio: Entry(tuple(cells)) for ratio, cells in by_ratio.items()} for label, by_ratio in grouped.items()
    }


def ratios(results: Sequence[Record]) -> list[float]:
    """The ratios of the grid, largest first."""
    given = {record["keep_ratio"] for record in results} - {None}
    return sorted((ratio for ratio in given if 0 < ratio < 1), reverse=True)


def studies(results: Sequence[Record]) -> dict[str, list[Record]]:
    """The results of each model on each task, by what their plots' names end in: nothing where there is one alone."""
    grouped: dict[tuple[str, str], list[Record]] = {}
    for record in results:
        grouped.setdefault((record["task"], record["model"]), []).append(record)
    if len(grouped) == 1:
        return {"": list(results)}
    named: dict[str, list[Record]] = {}
    for number, ((task, model), own) in enumerate(grouped.items(), start=1):
        named[f"-{number}-{task}-{re.sub(r'[^A-Za-z0-9.]+', '-', Path(model).name)}"] = own
    return named


def percent(value: float | None) -> str:
    return _MISSING if value is None else f"{100 * value:.1f}"


def flops(value: float) -> str:
    """With a unit: 1.23 GFLOPs."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}FLOPs"
    return f"{value:.3g} FLOPs"


def accuracy(entry: Entry) -> str:
    """Score in per cent with its 95 % interval, and the spread over seeds where there are several."""
    low, high = entry.interval
    spread = "" if entry.spread is None else f" ±{100 * entry.spread:.1f}"
    return f"{percent(entry.mean('score'))}{spread} [{100 * low:.1f}, {100 * high:.1f}]"


def retention(entry: Entry) -> str:
    """Score over the full model's in per cent, with the paired interval of a single cell."""
    if entry.mean("retention") is None:
        return _MISSING
    low = mean(cell["retention_ci"][0] for cell in entry.cells)
    high = mean(cell["retention_ci"][1] for cell in entry.cells)
    return f"{percent(entry.mean('retention'))} [{100 * low:.1f}, {100 * high:.1f}]"


def tokens(entry: Entry) -> str:
    """Measured visual tokens entering the last layer, and the layer-averaged share."""
    return f"{entry.mean('final_tokens'):.1f} ({percent(entry.mean('measured_keep_ratio'))} %)"


def cost(entry: Entry) -> str:
    """Prefill FLOPs of the language model and their share of the unpruned ones."""
    share = entry.mean("prefill_flops") / entry.mean("unpruned_prefill_flops")
    return f"{flops(entry.mean('prefill_flops'))} ({percent(share)} %)"


def terminal_table(results: Sequence[Record]) -> Table:
    """Methods by budgets; in each place accuracy, retention, measured tokens and FLOPs."""
    first = results[0]
    table = Table(
        title=f"{first['task']}, {first['model']}, {first['n']} examples",
        caption="accuracy in %, ± over seeds; ret: share of the full model's accuracy in %; "
        "visual tokens measured in the last layer, share of the unpruned prefill FLOPs",
        show_lines=True,
    )
    table.add_column("method", no_wrap=True)
    columns = ratios(results)
    for ratio in columns:
        table.add_column(f"{100 * ratio:g} % kept")
    for label, by_ratio in rows(results).items():
        if set(by_ratio) & set(columns):
            table.add_row(escape(label), *(_place(by_ratio.get(ratio)) for ratio in columns))
        else:  # full, zero, counts, schedules: one budget of their own
            table.add_row(escape(label), _place(next(iter(by_ratio.values()))))
    return table


def _place(entry: Entry | None) -> str:
    if entry is None:
        return _MISSING
    if not entry.ok:
        return f"[dim]{escape(entry.status)}[/dim]"
    spread = "" if entry.spread is None else f" ±{100 * entry.spread:.1f}"
    share = entry.mean("prefill_flops") / entry.mean("unpruned_prefill_flops")
    return (
        f"[bold]{percent(entry.mean('score'))}[/bold]{spread}\n"
        f"ret {percent(entry.mean('retention'))}\n"
        f"[dim]{entry.mean('final_tokens'):.1f} tok {100 * share:.0f}%[/dim]"
    )


def _markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def budget_table(results: Sequence[Record], show: Callable[[Entry], str]) -> str:
    """Markdown table of methods by budgets; `show` fills a place."""
    columns = ratios(results)
    body = []
    for label, by_ratio in rows(results).items():
        if set(by_ratio) & set(columns):
            cells = [by_ratio.get(ratio) for ratio in columns]
        else:
            cells = [next(iter(by_ratio.values()))] + [None] * (len(columns) - 1)
        body.append([label, *(_MISSING if c is None else show(c) if c.ok else f"*{c.status}*" for c in cells)])
    return _markdown_table(["method", *(f"{100 * ratio:g} %" for ratio in columns)], body)


def _by_family(results: Sequence[Record], ratio: float) -> str:
    families = list(results[0]["family_scores"])
    body = []
    for label, by_ratio in rows(results).items():
        entry = by_ratio.get(ratio) or next((by_ratio[own] for own in (1.0, 0.0, None) if own in by_ratio), None)
        if entry is None or not entry.ok:
            continue
        body.append([label, *(percent(entry.family(f)) for f in families)])
    return _markdown_table(["method", *families], body)


_ON_ACCURACY = """\
Per cent of the answers that are right, with a 95 % bootstrap interval. Rows with several seeds show their
mean, ± their standard deviation, and the mean interval of one seed. `full` and `zero` have no budget and
stand in the first column: all visual tokens, and none (what the question alone gives away). So do rows whose budget
is a count of tokens or their own schedule."""

_ON_RETENTION = """\
Accuracy over that of the full model in per cent. The interval is a paired bootstrap over examples: both
models answer the same drawn questions, so what makes all of them easy or hard cancels."""

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

_ON_PUBLISHED = """\
Ours beside what a paper prints for the setting. Its number is of its own benchmarks and model, so the difference says
something only where these are the same."""

_ON_FAMILIES = "Per cent right of each kind of question, mean over seeds; `full` and `zero` repeated for comparison."


def _published(results: Sequence[Record]) -> str:
    """Markdown table of the rows that are published settings, ours beside what a paper prints."""
    body = []
    for label, by_ratio in rows(results).items():
        entry = next(iter(by_ratio.values()))
        if not (given := entry.cells[0].get("published")):
            continue
        ours = entry.mean("retention" if given["metric"] == "retention" else "score") if entry.ok else None
        apart = _MISSING if ours is None else f"{100 * (ours - given['value']):+.1f}"
        where = f"{given['source']}, {given['table']}"
        body.append([label, given["metric"], percent(ours), percent(given["value"]), apart, given["benchmarks"], where])
    return _markdown_table(["setting", "in %", "ours", "theirs", "difference", "theirs is of", "source"], body)


def summary_markdown(results: Sequence[Record]) -> str:
    """All tables of every model on every task, how to read them, and what they were computed with."""
    return "\n\n".join(_study_markdown(own, suffix) for suffix, own in studies(results).items()) + "\n"


def _study_markdown(results: Sequence[Record], suffix: str) -> str:
    first = results[0]
    parts = [
        f"# {first['task']}: {first['model']}, {first['n']} examples",
        f"![accuracy against visual tokens and FLOPs](pareto{suffix}.png)",
        *("## Accuracy", _ON_ACCURACY, budget_table(results, accuracy)),
        *("## Retention", _ON_RETENTION, budget_table(results, retention)),
        *("## Visual tokens, measured", _ON_TOKENS, budget_table(results, tokens)),
        *("## Prefill cost", _ON_COST, budget_table(results, cost)),
        *("## By kind of question", _ON_FAMILIES, f"![accuracy by kind of question](families{suffix}.png)"),
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
