# SPDX-License-Identifier: Apache-2.0
"""Write the README's table of methods, from what the methods say of themselves.

The rows follow `vtprune/methods/catalogue.py`. A row has the method's name, its stages, the first line of its file, its
`signal` and its `paper`.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from vtprune.methods import catalogue
from vtprune.methods.base import Method

README = Path(__file__).parent.parent / "README.md"
STAGES = {
    "encoder": "in the vision encoder",
    "before_llm": "before the LLM",
    "in_llm": "inside the LLM",
    "decode": "in the KV cache",
}
"""A stage of `Method.stage` -> how the table names it."""
MARKERS = re.compile(r"(?<=<!-- methods:begin -->\n).*?(?=<!-- methods:end -->)", re.DOTALL)


def row(method: type[Method]) -> list[str]:
    """The cells of a method."""
    file = Path(inspect.getfile(method))
    title, purpose = (inspect.getdoc(sys.modules[method.__module__]) or "").split(": ", 1)
    paper = method.paper.removeprefix("arXiv ")
    return [
        f"[`{method.name}`](vtprune/methods/{file.name})",
        ", ".join(STAGES[stage] for stage in method.stage.split(", ")),
        purpose.removesuffix("."),
        method.signal,
        "baseline" if paper == "-" else f"[{title}, {paper}](https://arxiv.org/abs/{paper})",
    ]


def table() -> str:
    """The table of all methods of the library, as Markdown."""
    rows = [row(catalogue.load(name)) for name in catalogue.CLASSES]
    header = ["name", "acts", "what it does", "goes by", "source"]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *rows))


if __name__ == "__main__":
    README.write_text(MARKERS.sub(table(), README.read_text(encoding="utf-8")), encoding="utf-8")
