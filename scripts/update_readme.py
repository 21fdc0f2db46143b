# SPDX-License-Identifier: Apache-2.0
"""Put the results of a run into README.md: its table, its plot and its summary as they were measured.

Run after `vtprune eval eval/configs/NAME.yaml`; writes `docs/NAME/` and what stands between the README's markers
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
SUBJECTS = {
    "quickstart": "DigitScenes, the benchmark in the repository,",
    "video": "DigitScenes-Video, the same with clips,",
}
"""Runs that the README shows, and what their questions are of."""


def main(
    results: Annotated[Path, typer.Argument(help="Folder of a finished run.")] = ROOT / "results" / "quickstart",
    readme: Annotated[Path, typer.Option(help="File with the markers; docs/ lies beside it.")] = ROOT / "README.md",
) -> None:
    """Update README.md and docs/ from a finished run."""
    name = results.name
    if name not in SUBJECTS:
        raise typer.BadParameter(f"{results}: expected a folder called {' or '.join(SUBJECTS)}")
    markers = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    text = readme.read_text(encoding="utf-8")
    if not markers.search(text):
        raise typer.BadParameter(f"{readme} has no markers for {name}")
    records = read_results(results / "results.jsonl")
    docs = readme.parent / "docs" / name
    docs.mkdir(parents=True, exist_ok=True)
    for file in ("pareto.png", "families.png", "summary.md"):
        shutil.copyfile(results / file, docs / file)
    caption = (
        f"Accuracy in % (95 % interval, ± over seeds) on {records[0]['n']:,} questions of {SUBJECTS[name]} by share of "
        "visual tokens kept. All numbers (retention, measured tokens, FLOPs, kinds of question): "
        f"[summary](docs/{name}/summary.md)."
    )
    block = (
        f"{textwrap.fill(caption, 120, break_on_hyphens=False)}\n\n"
        f"{budget_table(records, accuracy)}\n\n"
        f"![accuracy against measured visual tokens and FLOPs](docs/{name}/pareto.png)\n"
    )
    readme.write_text(markers.sub(lambda m: m[1] + block + m[2], text), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
