# SPDX-License-Identifier: Apache-2.0
"""Write docs/methods.md: the table of all methods, and what deviates from the references, from what the methods say.

The order is that of `vtprune/methods/catalogue.py`. A method states its stage, signal, paper and properties in its
class, what it does in the first line of its file, and its deviations in one sentence of the class's docstring. Whether
it needs a CLS token is asked of a tiny model that has none. Vectors are those of tests/golden.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from pathlib import Path

from torch import nn

from vtprune import catalogue
from vtprune.methods.base import Method
from vtprune.support import why_not
from vtprune.testing import families

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "methods.md"
STAGES = {
    "encoder": "in the encoder",
    "before_llm": "before the LLM",
    "in_llm": "in the LLM",
    "decode": "in the cache",
}
"""A stage of `Method.stage` -> how the table names it."""
WITHOUT_CLS = "paligemma"
"""A family of `vtprune.testing` whose vision encoder has no CLS token."""
HEADER = ["method", "year", "acts", "goes by", "text", "CLS", "merges", "count", "paper", "vectors", "deviations"]
TEXT = """\
<!-- Written by `python scripts/update_methods.py`; a test fails when stale. -->

# Methods

[Which one should I take?](choosing.md) This page lists what there is. [What works on what](support.md) says which
families of models take which method.

* **text**: the prompt's text decides, with the image, what is kept.
* **CLS**: encoders without a CLS token, as SigLIP's, are refused. Other methods that look at CLS attention take the
  attention that tokens receive where there is no such token.
* **merges**: tokens that go are averaged into tokens that stay; otherwise they are dropped.
* **count**: what decides how many tokens stay. With `keep_ratio` or `keep_tokens` it is always the budget. Without one,
  some methods have a schedule or a number (*published*), some look at the image (*content*), and some are refused
  (*budget*). `zero` keeps none (*none*).
* **vectors**: inputs and results recorded from the official implementation that are in
  [the repository](../tests/golden/README.md) and that the tests compare. 0: there is no public code, or none that runs.
* **deviations**: how many differences from the reference are listed below the table.

`vtprune methods` prints where they act and what they go by, with the methods of other packages. Evaluations add the
baseline `downsample`: a smaller image with as many tokens, or fewer frames of a video. Methods compose; each ratio
counts the tokens that reach the method:

```python
vtprune.prune(model, [{"name": "divprune", "keep_ratio": 0.25}, {"name": "fastv", "keep_ratio": 0.5}])
```

Where a reference implementation has a defect, the method does not repeat it. `reference_quirks=True` (`holitom`, `aim`,
`bvllm_merge`, `recoverable`, `cdpruner`, `visionzip`, `ltp`, `mustdrop`) repeats it; the docstrings describe the
defects.

"""


def deviations(method: type[Method]) -> list[str]:
    """The differences from the reference that a class's docstring states, in one sentence with semicolons."""
    text = " ".join((inspect.getdoc(method) or "").split())
    found = re.search(r"Deviations?( [^:]*)?: ", text)
    if found is None:
        return []
    parts, depth = [""], 0
    for character, following in zip(text[found.end() :], text[found.end() + 1 :] + " ", strict=True):
        depth += (character == "(") - (character == ")")
        if depth == 0 and character == "." and following == " ":
            break
        if depth == 0 and character == ";":
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip() != "none"]


def vectors() -> Counter[str]:
    """Name of a method -> number of its vectors in tests/golden. Files are named after methods."""
    by_length = sorted(catalogue.CLASSES, key=len, reverse=True)
    cases = [path.stem.replace("_", "") for path in (ROOT / "tests" / "golden").glob("*.npz")]
    return Counter(next(name for name in by_length if case.startswith(name.replace("_", ""))) for case in cases)


def needs_cls(name: str, without_cls: nn.Module) -> bool:
    """Whether a method is refused because an encoder has no CLS token."""
    budget = {"keep_ratio": 0.5} if catalogue.load(name).needs_budget else {}
    return "a CLS token" in (why_not(without_cls, {"name": name, **budget}) or "")


def count(method: type[Method]) -> str:
    """What decides how many tokens stay if no budget is given."""
    if method.needs_budget:
        return "budget"
    if method.adaptive:
        return "content"
    return "published" if identifier(method) else "none"


def identifier(method: type[Method]) -> str:
    """The number of a method's paper on arXiv; empty for a baseline."""
    return method.paper.removeprefix("arXiv ").removeprefix("-")


def title(method: type[Method]) -> tuple[str, str]:
    """The name of a method as its authors write it, and what it does, as the first line of its file says."""
    name, purpose = (inspect.getdoc(sys.modules[method.__module__]) or "").splitlines()[0].split(": ", 1)
    return name, purpose


def row(name: str, recorded: int, without_cls: nn.Module) -> list[str]:
    """The cells of a method."""
    method = catalogue.load(name)
    paper, stated = identifier(method), len(deviations(method))
    return [
        f"[`{name}`](../vtprune/methods/{Path(inspect.getfile(method)).name})",
        f"20{paper[:2]}" if paper else "–",
        ", ".join(STAGES[stage] for stage in method.stage.split(", ")),
        method.signal,
        "✓" if method.text_aware else "",
        "✓" if needs_cls(name, without_cls) else "",
        "✓" if method.merges else "",
        count(method),
        f"[{paper}](https://arxiv.org/abs/{paper})" if paper else "baseline",
        str(recorded) if paper else "–",
        f"[{stated}](#{name})" if stated else "none" if paper else "–",
    ]


def section(name: str) -> str:
    """What a method does, and its deviations."""
    method = catalogue.load(name)
    heading, purpose = title(method)
    lines = [f"### {name}", "", f"{heading}: {purpose}"]
    stated = deviations(method)
    if stated:
        lines += ["", "Deviations from the reference:", "", *(f"* {part}" for part in stated)]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page, as Markdown."""
    recorded, without_cls = vectors(), families.build(WITHOUT_CLS)
    rows = [row(name, recorded[name], without_cls) for name in catalogue.CLASSES]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in (HEADER, ["---"] * len(HEADER), *rows))
    sections = "\n".join(section(name) for name in catalogue.CLASSES)
    return f"{TEXT}{table}\n## What each does, and where it deviates\n\n{sections}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
