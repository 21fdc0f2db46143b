# SPDX-License-Identifier: Apache-2.0
"""Put the results of a run into its page, README.md or one in docs/: the table, the plot and the summary as measured.

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
from vtprune.eval.results.records import read_results
from vtprune.eval.results.summary import budget_table

ROOT = Path(__file__).parent.parent
PAGES = {
    "quickstart": ("README.md", "DigitScenes, the benchmark in the repository,"),
    "video": ("docs/results.md", "DigitScenes-Video, the same with clips,"),
}
"""Name of a run -> the page that shows it, and the benchmark that its questions are from."""


def main(
    results: Annotated[Path, typer.Argument(help="Folder of a finished run.")] = ROOT / "results" / "quickstart",
    root: Annotated[Path, typer.Option(help="Folder with README.md and docs/.")] = ROOT,
) -> None:
    """Update README.md or a page in docs/ from a finished run."""
    name = results.name
    if name not in PAGES:
        raise typer.BadParameter(f"{results}: expected a folder called {' or '.join(PAGES)}")
    page, subject = root / PAGES[name][0], PAGES[name][1]
    markers = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    text = page.read_text(encoding="utf-8")
    if not markers.search(text):
        raise typer.BadParameter(f"{page} has no markers for {name}")
    records = read_results(results / "results.jsonl")
    docs = root / "docs" / name
    link = docs.relative_to(page.parent).as_posix()
    docs.mkdir(parents=True, exist_ok=True)
    for file in ("pareto.png", "families.png", "summary.md"):
        shutil.copyfile(results / file, docs / file)
    caption = (
        f"Accuracy in % (95 % interval, ± over seeds) on {records[0]['n']:,} questions of {subject} by share of "
        "visual tokens kept. All numbers (retention, measured tokens, FLOPs, kinds of question): "
        f"[summary]({link}/summary.md)."
    )
    block = (
        f"{textwrap.fill(caption, 120, break_on_hyphens=False)}\n\n"
        f"{budget_table(records, accuracy)}\n\n"
        f"![accuracy against measured visual tokens and FLOPs]({link}/pareto.png)\n"
    )
    page.write_text(markers.sub(lambda m: m[1] + block + m[2], text), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
