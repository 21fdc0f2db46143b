# SPDX-License-Identifier: Apache-2.0
"""What `vtprune tune` prints and writes: the table, `tune.txt` and `tuned.yaml`."""

from __future__ import annotations

import io
import textwrap

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vtprune.eval.results.records import write_atomically
from vtprune.eval.tasks import name_of
from vtprune.eval.tuning.choice import Outcome, front, retention, shown, why
from vtprune.eval.tuning.config import TuneConfig

TUNED = "tuned.yaml"
_WIDTH = 110
_HEAD = ("setting", "tokens", "FLOPs, %", "retention, %", "of", "")
"""FLOPs of the prefill as a share of the full model's; `of` so many examples."""


def _rows(outcome: Outcome) -> list[list[str]]:
    on_front = {run.sample.cell.title for run in front(outcome.found.runs)}
    rows = []
    for run in shown(outcome):
        chosen = outcome.found.choice is not None and run.sample.cell == outcome.found.choice.sample.cell
        mark = "chosen" if chosen else "front" if run.sample.cell.title in on_front else "baseline"
        sample = run.sample
        rows.append(
            [
                run.name,
                f"{sample.tokens:.1f}",
                f"{100 * sample.costs['flops']:.1f}",
                retention(sample),
                str(len(sample.scores)),
                mark,
            ]
        )
    return rows


def terminal_table(outcome: Outcome) -> Table:
    """The Pareto front, the choice and the baselines; fits 80 columns."""
    table = Table(title="tokens against retention", caption="of: examples of the tuning share")
    for name in _HEAD:
        table.add_column(name, overflow="fold", no_wrap=name.startswith("retention"))
    for row in _rows(outcome):
        style = "bold" if row[-1] == "chosen" else None
        table.add_row(*map(escape, row), style=style)
    return table


def show(outcome: Outcome, console: Console) -> None:
    """Prints the table, and why the choice was made."""
    console.print(terminal_table(outcome))
    for line in why(outcome):
        console.print(line, highlight=False, markup=False)


def write(outcome: Outcome, config: TuneConfig) -> None:
    """Writes `tune.txt`, and `tuned.yaml` if there is a choice."""
    folder, settings = config.evaluation.output, config.evaluation
    title = f"{outcome.goal} on {name_of(settings.task[0])}, {settings.model[0]}"
    text = io.StringIO()
    text.write(f"vtprune tune {title}\n\n")
    show(outcome, Console(file=text, width=_WIDTH))
    if outcome.refused:
        text.write("\nNot in the race, because the model does not support them:\n")
        text.writelines(f"* {reason}\n" for reason in outcome.refused.values())
    write_atomically(folder / "tune.txt", text.getvalue().encode())
    path = folder / TUNED
    choice = outcome.found.choice
    if choice is None:  # what an earlier command chose is not left to be taken for this one's choice
        path.unlink(missing_ok=True)
        return
    comment = "\n".join(textwrap.wrap(f"vtprune tune {title}. {' '.join(why(outcome))}", _WIDTH))
    spec = yaml.safe_dump(choice.sample.cell.spec, sort_keys=False)
    write_atomically(path, (textwrap.indent(comment, "# ") + "\n" + spec).encode())
