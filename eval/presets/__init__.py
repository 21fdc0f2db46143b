# SPDX-License-Identifier: Apache-2.0
"""Published settings by name, `METHOD/MODEL/BUDGET`, with the numbers that papers report for them.

A file beside this one holds the settings of one method and is named after it. Models have the names of
`vtprune.eval.bench.shapes`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from vtprune.config import ConfigModel, YamlFile, nearest, validate
from vtprune.errors import ConfigError


class Published(ConfigModel):
    """One number of a paper."""

    metric: Literal["retention", "score"]
    """share of the unpruned model's score, or the score itself"""
    value: Annotated[float, Field(ge=0, le=1.1)]
    benchmarks: str
    """the benchmarks that the number is measured on"""
    source: str
    """the paper that prints the number; not always the paper of the method"""
    table: str
    """the table in that paper"""


class Flops(ConfigModel):
    """The cost of the language model according to a publication."""

    share: Annotated[float, Field(gt=0, lt=1)]
    """of the unpruned model's FLOPs"""
    convention: Literal["exact", "visual_only", "visual_only_gated", "llm_viewer"]
    """the formula, one of `vtprune.cost`"""
    text: Annotated[int, Field(ge=0)] = 0
    """text tokens that are counted"""


class Preset(ConfigModel):
    """One published setting."""

    params: dict[str, Any] = {}
    """parameters of the method other than the budget. Layers that are the method's defaults are not given here, so that
    they move with the depth of other models"""
    keep_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    keep_tokens: Annotated[int, Field(ge=0)] | None = None
    """the budget, as one of the two; if there is neither, the parameters state it"""
    visual_tokens: Annotated[int, Field(ge=1)]
    """number of them in the publication without pruning, in all crops or frames together"""
    crops: Annotated[int, Field(ge=1)] = 1
    kept: dict[int, int] | None
    """decoder layer -> visual tokens from its input on; None if only the data decide"""
    flops: Flops | None = None
    published: Published | None = None
    """None if no number is printed for this setting"""

    def row(self, method: str) -> dict[str, Any]:
        """The setting as a row of an evaluation file."""
        budget: dict[str, Any] = {"keep_ratios": []}
        if self.keep_tokens is not None:
            budget = {"keep_tokens": [self.keep_tokens]}
        elif self.keep_ratio is not None:
            budget = {"keep_ratios": [self.keep_ratio]}
        return {"name": method, **self.params, **budget}


class _File(ConfigModel):
    presets: dict[str, Preset]


@cache
def presets() -> dict[str, Preset]:
    """All published settings, by name."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.yaml")):
        for name, preset in validate(_File, YamlFile(path)).presets.items():
            found[f"{path.stem}/{name}"] = preset
    return found


def find(name: Any) -> Preset:
    """The published setting called `name`.

    Raises:
        ConfigError: there is no such setting. The message names the nearest ones.
    """
    known = presets()
    if name not in known:
        raise ConfigError(f"unknown preset {name!r}; {nearest(str(name), known)}")
    return known[name]
