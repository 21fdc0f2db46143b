# SPDX-License-Identifier: Apache-2.0
"""Whatever a method is asked for with, it is made, or the library says what is wrong with it."""

from __future__ import annotations

import dataclasses
import random
from collections import UserDict, UserString
from datetime import date
from pathlib import Path

import pytest
import torch

import vtprune
from vtprune.errors import BudgetError, ConfigError, VTPruneError
from vtprune.methods import build_method, build_methods
from vtprune.testing import families

NAMES = sorted(vtprune.list_methods())
SPECIAL = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        10**400,
        10**5000,
        -(10**30),
        2**63,
        0.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
        1j,
    ),
    *(
        "",
        "nan",
        "0.5",
        "mmtok",
        "auto",
        "\x00",
        "\x00.yaml",
        "no.yml",
        "\ud800",
        "ä" * 300,
        b"",
        b"mmtok",
        bytearray(b"x"),
        date(2026, 1, 1),
    ),
    *(object(), type, len, ..., NotImplemented, range(3), {1, 2}, frozenset(), Path("."), UserString("mmtok")),
    *(torch.zeros(2), torch.tensor(float("nan")), slice(2), lambda: 1, UserDict(name="mmtok"), vtprune.FastV),
]


def anything(draw: random.Random, depth: int = 3) -> object:
    """A value of a kind that YAML, JSON or a slip may bring."""
    kind = draw.random()
    if kind < 0.7 or not depth:
        return draw.choice([draw.choice(SPECIAL), draw.randint(-5, 50), draw.uniform(-1, 2), draw.choice(NAMES)])
    inner = [anything(draw, depth - 1) for _ in range(draw.randint(0, 3))]
    if kind < 0.85:
        return draw.choice([list, tuple, iter])(inner)
    return {key(draw): value for value in inner}


def key(draw: random.Random) -> object:
    fields = ("name", "keep_ratio", "keep_tokens", "positions", "layer", "scope", "keep_ratoi", "spec", "self")
    return draw.choice([*fields, *fields, 1, None, b"name", ("keep_ratio",), 0.5, True, ""])


def specification(draw: random.Random) -> object:
    kind = draw.random()
    if kind < 0.15:
        return anything(draw)
    name = draw.choice(NAMES)
    fields = [field.name for field in dataclasses.fields(vtprune.list_methods()[name])]
    one = {"name": name} | {draw.choice(fields): anything(draw, 2) for _ in range(draw.randint(1, 3))}
    if kind < 0.4:
        one[key(draw)] = anything(draw)
    if kind < 0.5:
        return [one, anything(draw)]
    return one


def parameters(draw: random.Random) -> dict[str, object]:
    given = {str(key(draw)): anything(draw, 2) for _ in range(draw.choice([0, 0, 1, 2]))}
    return {name: value for name, value in given.items() if name not in ("spec", "self")}


def made_or_refused(build, spec, given, expected=(ConfigError, BudgetError)) -> bool:
    """Whether methods were made; an error that is not of the library gets what it came from."""
    try:
        made = build(spec, **given)
    except expected:
        return False
    except Exception as error:
        raise AssertionError(f"{build.__name__}({spec!r}, **{given!r}) raised {type(error).__name__}") from error
    methods = made if isinstance(made, list) else [made]
    assert all(isinstance(method, (vtprune.Method, vtprune.Session)) for method in methods)
    return True


def test_10000_configurations_are_made_or_refused():
    draw = random.Random(19)
    made = [
        made_or_refused(draw.choice([build_method, build_methods]), specification(draw), parameters(draw))
        for _ in range(10_000)
    ]
    assert 200 < sum(made) < 5_000  # both happen


def test_sessions_are_made_or_refused():
    draw = random.Random(20)
    model = families.shared("llava")

    def session(spec, **given):
        return vtprune.prune(model, spec, **given)

    made = [made_or_refused(session, specification(draw), parameters(draw), VTPruneError) for _ in range(2_000)]
    assert 20 < sum(made) < 1_000
    for nonsense in SPECIAL:
        with pytest.raises(VTPruneError):
            vtprune.prune(nonsense, "mmtok", keep_ratio=0.5)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (0.25, "expected a method, its name.*got 0.25"),
        ([["mmtok"]], "expected a method, its name or a mapping with 'name', got \\['mmtok'\\]"),
        ({"name": ["mmtok"]}, "the name of a method is a string, got \\['mmtok'\\]"),
        ({"keep_ratio": 0.5}, "the name of a method is a string, got None in {'keep_ratio': 0.5}"),
        ({"name": "mmtok", 5: 1}, "mmtok: unknown parameter 5: known are "),
        ({"name": "mmtok", "keep_ratio": 10**5000}, "mmtok: keep_ratio=something of the type int: "),
        ("\0.yaml", "cannot be read"),
    ],
)
def test_what_the_error_says(spec, words):
    with pytest.raises((ConfigError, BudgetError), match=words):
        build_methods(spec)
