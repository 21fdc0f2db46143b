# SPDX-License-Identifier: Apache-2.0
"""Put the results of the quickstart into README.md: its table, its plot and its summary as they were measured.

Run after `make quickstart`; writes `docs/quickstart/` and what stands between the README's result markers.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Annotated

import typer

from vtprune.eval.results import read_results
from vtprune.eval.summary import accuracy, budget_table

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- results:begin -->\n).*?(<!-- results:end -->)", re.DOTALL)


def main(
    results: Annotated[Path, typer.Argument(help="Folder of a finished run.")] = ROOT / "results" / "quickstart",
) -> None:
    """Update README.md and docs/quickstart from a finished run."""
    records = read_results(results / "results.jsonl")
    docs = ROOT / "docs" / "quickstart"
    docs.mkdir(parents=True, exist_ok=True)
    for name in ("pareto.png", "families.png", "summary.md"):
        shutil.copyfile(results / name, docs / name)
    first = records[0]
    text = (
        f"Accuracy in % (95 % interval, ± over seeds) on {first['n']:,} questions of DigitScenes, the benchmark in\n"
        "the repository, by share of visual tokens kept. All numbers (retention, measured tokens, FLOPs, kinds of\n"
        "question): [summary](docs/quickstart/summary.md).\n\n"
        f"{budget_table(records, accuracy)}\n\n"
        "![accuracy against measured visual tokens and FLOPs](docs/quickstart/pareto.png)\n"
    )
    readme = ROOT / "README.md"
    readme.write_text(BLOCK.sub(lambda m: m[1] + text + m[2], readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
