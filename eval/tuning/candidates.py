# SPDX-License-Identifier: Apache-2.0
"""What runs in the race: methods and compositions without a budget, and the baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vtprune.eval.method_rows import BASELINES
from vtprune.eval.running.cells import Cell
from vtprune.methods import build_method, list_methods
from vtprune.methods.base import BeforeLLM

SMALLER_IMAGE = "downsample"
"""The baseline that no method file can hold: it is measured, and never chosen."""

_NOT_IN_THE_RACE = ("zero",)
_TRIED = 0.5
"""A budget that every method can meet, for the question whether the model supports it."""

_PARENTS = 2
"""How many of the best methods of a stage are composed."""
_TWINS = 3
"""Of how many of the best candidates the other positions and scopes are tried."""

WhyNot = Callable[[Any], str | None]
"""A method with a budget -> why the model refuses it, or None."""


@dataclass(frozen=True)
class Candidate:
    """A method and its parameters, or several in one session, or a baseline; without a budget."""

    parts: tuple[Mapping[str, Any], ...]
    """each one's name and parameters"""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(part["name"] for part in self.parts)

    @property
    def label(self) -> str:
        """For people, e.g. `mmtok(scope=image)` or `tome + fastv`."""
        called = []
        for part in self.parts:
            given = ", ".join(f"{key}={value}" for key, value in part.items() if key != "name")
            called.append(f"{part['name']}({given})" if given else part["name"])
        return " + ".join(called)

    @property
    def is_method(self) -> bool:
        """Whether `vtprune.prune` takes it."""
        return self.names[0] not in BASELINES

    def setting(self, keep_ratio: float) -> Cell:
        """The candidate at a budget. The parts of a composition keep equal shares, whose product is the budget."""
        if not self.is_method:
            return Cell(self.names[0], keep_ratio)
        if len(self.parts) > 1:
            each = round(keep_ratio ** (1 / len(self.parts)), 4)
            parts = tuple({**part, "keep_ratio": each} for part in self.parts)
            return Cell(" + ".join(self.names), round(each ** len(parts), 4), parts=parts)
        (part,) = self.parts
        given = {key: value for key, value in part.items() if key != "name"}
        seed = getattr(build_method({**part, "keep_ratio": keep_ratio}), "seed", None)
        return Cell(part["name"], keep_ratio, given=given, seed=seed)


def first_candidates(why_not: WhyNot) -> tuple[list[Candidate], dict[str, str]]:
    """Every method that the model supports, and the smaller image; and why each other method is left out.

    Baselines are methods like others: random, uniform, pool.
    """
    candidates, refused = [Candidate(({"name": SMALLER_IMAGE},))], {}
    for name in list_methods():
        if name in _NOT_IN_THE_RACE:
            continue
        candidate = Candidate(({"name": name},))
        reason = why_not(candidate.setting(_TRIED).spec)
        if reason is None:
            candidates.append(candidate)
        else:
            refused[name] = reason
    return candidates, refused


def compositions(ranked: Sequence[Candidate], why_not: WhyNot) -> list[Candidate]:
    """Pairs of the best methods of different stages, in the order of the path, that the model supports.

    ranked: the candidates that go on, the best first. Every candidate here is a single method of one stage, or is left
    out.
    """
    by_stage: dict[str, list[Candidate]] = {"encoder": [], "before_llm": [], "in_llm": []}
    methods = list_methods()
    for candidate in ranked:
        if candidate.is_method and len(candidate.parts) == 1:
            same = by_stage.get(methods[candidate.names[0]].stage)
            if same is not None and len(same) < _PARENTS:
                same.append(candidate)
    pairs = [
        Candidate(first.parts + second.parts)
        for before, behind in (("encoder", "before_llm"), ("encoder", "in_llm"), ("before_llm", "in_llm"))
        for first in by_stage[before][:1]
        for second in by_stage[behind]
    ]
    return [pair for pair in pairs if why_not(pair.setting(_TRIED).spec) is None]


def twins(ranked: Sequence[Candidate], several_crops: bool, why_not: WhyNot) -> list[Candidate]:
    """The best candidates with the other positions, and with one budget for a whole image or video.

    several_crops: whether the task's prompts have several crops or frames; with one, both scopes are the same.
    """
    found = []
    for candidate in [c for c in ranked if c.is_method and len(c.parts) == 1][:_TWINS]:
        (part,) = candidate.parts
        kind = list_methods()[part["name"]]
        changes: list[dict[str, Any]] = []
        if "positions" not in part:
            default = build_method({**part, "keep_ratio": _TRIED}).positions
            changes.append({"positions": "original" if default == "compact" else "compact"})
        if several_crops and issubclass(kind, BeforeLLM) and "scope" not in part:
            changes.append({"scope": "image"})
        found += [Candidate(({**part, **change},)) for change in changes]
    return [twin for twin in found if why_not(twin.setting(_TRIED).spec) is None]
