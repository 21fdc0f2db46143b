# SPDX-License-Identifier: Apache-2.0
"""An extension of griffe, which reads docstrings for the site: the sections "Fields" of docstrings become lists.

A section is a line that begins with "Fields", and what is indented below it: "name: what it is", continued on lines
that are indented further.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

SECTION = re.compile(r"^(Fields[^\n]*)\n((?:    .*\n?|\n)+)", re.MULTILINE)


def listed(section: re.Match[str]) -> str:
    """A section as a heading in bold and a list, in Markdown."""
    lines = [f"**{section[1]}**", ""]
    for line in section[2].splitlines():
        item = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if item:
            names = ", ".join(f"`{name}`" for name in item[1].split(", "))
            lines.append(f"* {names}: {item[2]}")
        elif line:
            lines.append(f"    {line.strip()}")
    return "\n".join(lines) + "\n\n"


class Fields(Extension):
    """Rewrites the docstring of every object that is read."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Called by griffe with an object whose members have been read."""
        if obj.docstring is not None:
            obj.docstring.value = SECTION.sub(listed, obj.docstring.value)
