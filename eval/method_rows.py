# SPDX-License-Identifier: Apache-2.0
"""The rows of an evaluation file: methods with their parameters, budgets and seeds, presets, and composed methods."""

from __future__ import annotations

import dataclasses
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from vtprune.config import ConfigModel, key_error, load_method_file, nearest
from vtprune.errors import ConfigError, VTPruneError
from vtprune.eval.presets import find
from vtprune.methods import AUTO, build_method, build_methods, list_methods

Baseline = Literal["full", "zero", "downsample"]
BASELINES: tuple[str, ...] = get_args(Baseline)
KeepRatio = Annotated[float, Field(gt=0, lt=1)]

_ENTRY_KEYS = ("name", "preset", "seeds", "keep_ratios", "keep_tokens", "grid")
BUDGETS = ("keep_ratio", "keep_tokens")
"""Fields of every method that a row gives as lists."""

LISTS = {"keep_ratio": "keep_ratios", "keep_tokens": "keep_tokens", "seed": "seeds"}
"""Field of a method -> the key of a row that lists its values. The list may also stand in `grid`."""


class MethodEntry(ConfigModel):
    """A row of the comparison, or a grid of rows: a method, its parameters, its budgets, and its seeds."""

    name: str
    params: dict[str, Any] = {}
    """parameters other than the budget and the seed, as written"""
    grid: dict[str, tuple[Any, ...]] = {}
    """parameter -> its values; one row for each combination. Budgets and seeds may stand here or in the keys below"""
    seeds: tuple[int, ...] = ()
    """one cell each; only for methods with a `seed`"""
    keep_ratios: tuple[KeepRatio, ...] | None = None
    """budgets of this row; default: those of the file; if empty, the method's own schedule holds"""
    keep_tokens: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """budgets of this row as counts per crop, instead of ratios"""
    preset: str | None = None
    """the published setting that all of this comes from"""

    @model_validator(mode="after")
    def _buildable(self) -> MethodEntry:
        known = list_methods()
        if self.name in BASELINES:
            raise key_error("name", f"{self.name} is a baseline, list it under 'baselines'")
        if self.name == AUTO:
            raise key_error("name", "'auto' depends on the model; name a method: see `vtprune methods --model MODEL`")
        if self.name not in known:
            raise key_error("name", f"unknown method {self.name!r}; {nearest(self.name, known)}")
        fields = [field.name for field in dataclasses.fields(known[self.name]) if field.name not in BUDGETS]
        for key in (*self.params, *self.grid):
            if key in BUDGETS:
                raise key_error(key, "not as a single value: rows list budgets, see 'keep_ratios' and 'keep_tokens'")
            if key not in fields:
                raise key_error(key, f"unknown key; {nearest(key, [*fields, *_ENTRY_KEYS])}")
            if key in self.params and key in self.grid:
                raise key_error(key, "given twice, by itself and in 'grid'")
        for key, values in self.grid.items():
            if not values or len(set(map(str, values))) < len(values):
                raise key_error("grid", f"expected different values of {key}, got {list(values)}")
        self._check_seeds(fields)
        if self.keep_ratios is not None and self.keep_tokens is not None:
            raise key_error("keep_tokens", "give 'keep_ratios' or 'keep_tokens', not both")
        if self.keep_ratios == () and known[self.name].needs_budget:
            raise key_error("keep_ratios", f"{self.name} has no schedule of its own, it needs a budget")
        if self.keep_tokens == ():
            raise key_error("keep_tokens", "expected at least one count")
        for params in self.rows():
            try:
                build_method({"name": self.name, **params})
            except VTPruneError as error:
                raise ValueError(str(error)) from error
        return self

    def _check_seeds(self, fields: list[str]) -> None:
        if self.seeds and "seed" not in fields:
            raise key_error("seeds", f"{self.name} has no randomness to seed")
        if self.seeds and "seed" in self.params:
            raise key_error("seeds", "give 'seed' or 'seeds', not both")
        if len(set(self.seeds)) < len(self.seeds):
            raise key_error("seeds", f"a seed is given twice: {list(self.seeds)}")

    def rows(self) -> list[dict[str, Any]]:
        """The parameters of each row. The last parameter of the grid changes fastest."""
        combinations = product(*self.grid.values())
        return [{**self.params, **dict(zip(self.grid, values, strict=True))} for values in combinations]


def _entry(value: Any) -> Any:
    """A bare name, or a flat mapping whose unreserved keys are the method's parameters."""
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict):
        return value
    if "preset" in value:
        for key in value:
            if key not in ("preset", "seeds"):
                raise key_error(str(key), "does not go with 'preset', which says it all")
        try:
            value = {**value, **find(value["preset"]).row(value["preset"].split("/")[0])}
        except VTPruneError as error:
            raise key_error("preset", str(error)) from error
    known = {key: value[key] for key in _ENTRY_KEYS if key in value}
    if isinstance(known.get("grid"), dict):
        known["grid"] = dict(known["grid"])
        for field in known["grid"].keys() & LISTS.keys():
            if LISTS[field] in known:
                raise key_error("grid", f"{field} is given twice, here and as {LISTS[field]!r}")
            known[LISTS[field]] = known["grid"].pop(field)
    return {**known, "params": {key: item for key, item in value.items() if key not in _ENTRY_KEYS}}


class ComposedEntry(ConfigModel):
    """A row with several methods in one session: a list of names and mappings, as `vtprune.prune` takes it.

    Each part has a budget of its own, or its own schedule. A ratio counts the tokens that reach the method.
    """

    parts: tuple[dict[str, Any], ...]

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, parts: Any) -> Any:
        return {"parts": [{"name": part} if isinstance(part, str) else part for part in parts]}

    @model_validator(mode="after")
    def _buildable(self) -> ComposedEntry:
        if len(self.parts) < 2:
            raise ValueError("expected at least two methods in a list; a single one needs no list")
        try:
            build_methods(self.parts)
        except VTPruneError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def keep_ratio(self) -> float | None:
        """What all parts together are asked to keep; None if one of them has another budget than a ratio."""
        asked = [part.get("keep_ratio") for part in self.parts]
        return None if None in asked else round(prod(asked), 4)


def _with_files(rows: Any) -> Any:
    """Rows `{file: tuned.yaml}` replaced by the method, or the methods, of that file, each with its budget."""
    if not isinstance(rows, list | tuple):
        return rows
    return [
        _of_file(row, f"{place}.") if isinstance(row, dict) and "file" in row else row for place, row in enumerate(rows)
    ]


def _of_file(row: dict[str, Any], where: str) -> Any:
    for key in row:
        if key != "file":
            raise key_error(f"{where}{key}", "does not go with 'file', which says it all")
    if not isinstance(row["file"], str | Path):
        raise key_error(f"{where}file", f"expected the path of a YAML file with a method, got {row['file']!r}")
    try:
        found = load_method_file(row["file"])
    except ConfigError as error:
        raise key_error(f"{where}file", str(error)) from error
    if isinstance(found, list):
        return found
    budgets = {LISTS[key]: [found[key]] for key in BUDGETS if key in found}
    return {key: value for key, value in found.items() if key not in BUDGETS} | (budgets or {"keep_ratios": []})


def _kind_of_row(value: Any) -> str:
    return "composed" if isinstance(value, list | ComposedEntry) else "single"


Row = Annotated[
    Annotated[MethodEntry, BeforeValidator(_entry), Tag("single")] | Annotated[ComposedEntry, Tag("composed")],
    Discriminator(_kind_of_row),
]

Rows = Annotated[tuple[Row, ...], BeforeValidator(_with_files)]
