# SPDX-License-Identifier: Apache-2.0
"""What `vtprune models` prints."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from vtprune.adapters import list_adapters
from vtprune.adapters.coverage import Coverage, coverage


def families() -> Table:
    """The families that have an adapter: what they take, how they lay it out, which stages and signals methods get."""
    types: dict[type, list[str]] = {}
    for model_type, adapter in list_adapters().items():
        types.setdefault(adapter, []).append(model_type)
    table = Table("family", "model type", "media", "visual tokens", "stages", "signals", show_lines=True)
    for adapter, names in sorted(types.items(), key=lambda item: item[0].family):
        media = ", ".join(f"{kind}s" for kind in adapter.kinds)
        stages, signals = ", ".join(adapter.stages()), ", ".join(adapter.signals())
        table.add_row(adapter.family, ", ".join(names), media, adapter.layout, stages, signals)
    return table


def print_all(console: Console) -> None:
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
