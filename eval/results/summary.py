# SPDX-License-Identifier: Apache-2.0
"""Tables for people, in the terminal and in `summary.md`, from the lines of `results.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from statistics import mean

from rich.markup import escape
from rich.table import Table

from vtprune.eval.results.entries import Entry, ratios, rows, studies
from vtprune.eval.results.formatting import MISSING, accuracy, flops, percent
from vtprune.eval.results.records import Record


def retention(entry: Entry) -> str:
    """Score over the full model's in per cent, with its paired interval; over several seeds the means."""
    if entry.mean("retention") is None:
        return MISSING
    low = mean(cell["retention_ci"][0] for cell in entry.cells)
    high = mean(cell["retention_ci"][1] for cell in entry.cells)
    return f"{percent(entry.mean('retention'))} [{100 * low:.1f}, {100 * high:.1f}]"


def tokens(entry: Entry) -> str:
    """Measured visual tokens that enter the last layer, and their share averaged over the layers."""
    return f"{entry.mean('final_tokens'):.1f} ({percent(entry.mean('measured_keep_ratio'))} %)"


def cost(entry: Entry) -> str:
    """Prefill FLOPs of the language model and their share of the unpruned ones."""
    share = entry.mean("prefill_flops") / entry.mean("unpruned_prefill_flops")
    return f"{flops(entry.mean('prefill_flops'))} ({percent(share)} %)"


def terminal_table(results: Sequence[Record]) -> Table:
    """Methods by budgets. Each place has accuracy, retention, measured tokens and FLOPs."""
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
        else:  # full, zero, counts and schedules have a single budget
            table.add_row(escape(label), _place(next(iter(by_ratio.values()))))
    return table


def _place(entry: Entry | None) -> str:
    if entry is None:
        return MISSING
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


def summary_markdown(results: Sequence[Record]) -> str:
    """All tables of every model on every task, with notes on how to read them, and the provenance."""
    return "\n\n".join(_study_markdown(study, suffix) for suffix, study in studies(results).items()) + "\n"


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
