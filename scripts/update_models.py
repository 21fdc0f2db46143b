# SPDX-License-Identifier: Apache-2.0
"""Write the table of models in docs/models.md, from what the adapters say of themselves and transformers has."""

from __future__ import annotations

import re
from pathlib import Path

from vtprune.adapters.coverage import families
from vtprune.transformers_private import multimodal_classes

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
MARKERS = re.compile(r"(?<=<!-- models:begin -->\n).*?(?=<!-- models:end -->)", re.DOTALL)
SUFFIX = "ForConditionalGeneration"


def table() -> str:
    """The table of all families of the library, as Markdown."""
    rows, known = [], multimodal_classes()
    for adapter, types in families():
        if not adapter.__module__.startswith("vtprune."):
            continue
        names = [known[model_type.partition("/")[0]].removesuffix(SUFFIX) for model_type in types]
        classes = dict.fromkeys(f"`{name}`" for name in names)
        kinds = ", ".join(f"{kind}s" for kind in adapter.kinds)
        inside = "yes" if "in_llm" in adapter.stages() else "no"
        rows.append([adapter.family, ", ".join(classes), kinds, adapter.layout, inside])
    header = ["family", f"class (`…{SUFFIX}`)", "media", "visual tokens", "inside the LLM, too"]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *rows))


if __name__ == "__main__":
    PAGE.write_text(MARKERS.sub(table(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
