# SPDX-License-Identifier: Apache-2.0
"""Put the results of a run into docs/results.md: the table, the plot and the summary as measured.

Run it after `vtprune eval eval/configs/NAME.yaml`. It writes `docs/NAME/`, and the part of the page between the markers
`<!-- NAME:begin -->` and `<!-- NAME:end -->`.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from vtprune.eval.results.formatting import accuracy
from vtprune.eval.results.records import Record, read_results
from vtprune.eval.results.summary import budget_table, tasks_table
from vtprune.eval.results.terms import terms
from vtprune.eval.results.timings import latencies

ROOT = Path(__file__).parent.parent
SUBJECTS = {
    "quickstart": "DigitScenes, the benchmark in the repository,",
    "video": "DigitScenes-Video, the same with clips,",
    "clip": "DigitScenes, zero-shot,",
}
"""Name of a run -> the benchmark that its questions are from."""


def main(
    results: Annotated[Path, typer.Argument(help="Folder of a finished run.")] = ROOT / "results" / "quickstart",
    root: Annotated[Path, typer.Option(help="Folder with docs/.")] = ROOT,
) -> None:
    """Update docs/results.md from a finished run."""
    name = results.name
    if name not in SUBJECTS:
        raise typer.BadParameter(f"{results}: expected a folder called {' or '.join(SUBJECTS)}")
    page, subject = root / "docs" / "results.md", SUBJECTS[name]
    markers = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    text = page.read_text(encoding="utf-8")
    if not markers.search(text):
        raise typer.BadParameter(f"{page} has no markers for {name}")
    records = read_results(results / "results.jsonl")
    docs = root / "docs" / name
    link = docs.relative_to(page.parent).as_posix()
    docs.mkdir(parents=True, exist_ok=True)
    for file in (*docs.glob("*.png"), *docs.glob("*.md")):  # of an earlier run, which may have had other tasks
        file.unlink()
    plots = sorted(file.name for file in results.glob("*.png"))
    for file in (*plots, "summary.md"):
        shutil.copyfile(results / file, docs / file)
    caption, table = _classes(results, records, subject) if terms(records).classifies else _questions(records, subject)
    caption += f" [summary]({link}/summary.md)."
    pareto = next(file for file in plots if file.startswith("pareto"))
    block = (
        f"{textwrap.fill(caption, 120, break_on_hyphens=False)}\n\n"
        f"{table}\n\n"
        f"![accuracy against measured {terms(records).tokens}, FLOPs and latency]({link}/{pareto})\n"
    )
    page.write_text(markers.sub(lambda m: m[1] + block + m[2], text), encoding="utf-8")


def _questions(records: list[Record], subject: str) -> tuple[str, str]:
    """The caption and the table of one model on one task."""
    caption = (
        f"Accuracy in % (95 % interval, ± over seeds) on {records[0]['n']:,} questions of {subject} by share of "
        "visual tokens kept. All numbers (retention, measured tokens, FLOPs, kinds of question):"
    )
    return caption, budget_table(records, accuracy)


def _classes(results: Path, records: list[Record], subject: str) -> tuple[str, str]:
    """The caption and the table of one CLIP on several tasks. The plot below it is of the first one."""
    caption = (
        f"Accuracy in % on {records[0]['n']:,} images of each task of {subject} by share of patches left behind the "
        "last layer; in brackets, times those of `full`. The plot is of the first task. All numbers (intervals, "
        "retention, measured patches, classes):"
    )
    return caption, tasks_table(records, latencies([results]))


if __name__ == "__main__":
    typer.run(main)
