# SPDX-License-Identifier: Apache-2.0
"""What `vtprune models` and `vtprune methods` print."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from vtprune.adapters.coverage import Coverage, coverage, families
from vtprune.methods import list_methods
from vtprune.methods.schedules import Progressive


def print_families(console: Console) -> None:
    """Print the families that have an adapter: what they take, how they lay it out, which stages and signals methods
    get."""
    for adapter, types in families():
        console.print(f"{adapter.family} [{', '.join(types)}]", style="bold", markup=False, highlight=False)
        media = " and ".join(f"{kind}s" for kind in adapter.kinds)
        stages, signals = ", ".join(adapter.stages()), ", ".join(adapter.signals())
        for line in (f"{media}: {adapter.layout}", f"stages: {stages}", f"signals: {signals}"):
            console.print(Padding(line, (0, 0, 0, 4), expand=False), markup=False, highlight=False)


def print_models(console: Console) -> None:
    """Print every multimodal class of the installed transformers, supported ones by stages, others by reasons."""
    groups: dict[str, list[Coverage]] = {}
    for row in coverage():
        groups.setdefault(_heading(row), []).append(row)
    for heading, rows in sorted(groups.items(), key=lambda group: (group[1][0].adapter is None, group[0])):
        console.print(f"{heading} [{len(rows)}]", style="bold", markup=False, highlight=False)
        _print_rows(console, rows)
        console.print()


def _heading(row: Coverage) -> str:
    if row.adapter is not None:
        return f"Supported, with methods at these stages: {', '.join(row.adapter.stages())}"
    if row.refusal is None:
        return "Not known"
    reason = row.refusal.reason
    return f"Refused, {reason.name}: {reason.why}; {reason.helps}"


def _print_rows(console: Console, rows: Iterable[Coverage]) -> None:
    """A line a model type; what is special about it below, so that no name is broken in 80 columns."""
    for row in rows:
        console.print(f"  {row.model_type:24} {row.class_name}", highlight=False, soft_wrap=True)
        if row.refusal is not None and row.refusal.detail:
            console.print(Padding(row.refusal.detail, (0, 0, 0, 6), expand=False), highlight=False)


def all_methods() -> Table:
    """The methods: where they act, what they look at, their source."""
    table = Table("method", "stage", "signal", "default budget", "paper")
    for name, method in sorted(list_methods().items()):
        default = "published schedule" if issubclass(method, Progressive) else "none"
        budget = "must be given" if method.needs_budget else default
        table.add_row(name, method.stage, method.signal, budget, method.paper)
    return table


def print_methods_of(console: Console, model: str) -> None:
    """Print which methods fit a model, from its config alone. model: folder or hub id."""
    from vtprune.auto import default_for
    from vtprune.eval.inputs import empty_model
    from vtprune.support import fits

    empty = empty_model(model)
    default = default_for(empty)
    table = Table()
    table.add_column("method", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, fit in fits(empty).items():
        floor = f"keep_ratio from {fit.floor:.1%}" if fit.floor else ""
        table.add_row(name, "yes" if fit.reason is None else "no", escape(fit.reason or floor))
    console.print(table)
    given = "".join(f", {key}={value}" for key, value in default.spec.items() if key != "name")
    console.print(f'"auto" is {default.spec["name"]}{given}: {default.why}', highlight=False, markup=False)
