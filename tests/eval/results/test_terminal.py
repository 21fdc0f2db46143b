# SPDX-License-Identifier: Apache-2.0
"""The table in the terminal: 80 columns, every name whole, and a reason for every row without numbers."""

import io

import pytest
from rich.console import Console

from vtprune.eval.results.reasons import Reasons
from vtprune.eval.results.terminal import terminal_table
from vtprune.eval.results.timings import Latency

COMPOSED = "tome(keep_ratio=0.5) + transprune(keep_ratio=0.22)"
NUMBERS = {
    "status": "ok",
    "task": "mine",
    "model": "a/model",
    "n": 600,
    "score": 1.0,
    "ci": [1.0, 1.0],
    "gain": -0.1234,
    "gain_ci": None,
    "hard_score": 1.0,
    "hard_examples": 12,
    "loyalty": 1.0,
    "final_tokens": 2880.0,
    "average_tokens": 2880.0,
    "prefill_flops": 5e12,
    "unpruned_prefill_flops": 1e13,
}


def line(label, ratio, seed=None, **numbers):
    cell = f"{label}-{ratio}-{seed}"
    return NUMBERS | {"label": label, "method": label, "keep_ratio": ratio, "seed": seed, "cell": cell} | numbers


def refused(label, ratio, status, reason, **more):
    return line(label, ratio, status=status, reason=reason, **dict.fromkeys(("score", "gain", "hard_score")), **more)


LINES = [
    line("full", 1.0, gain=None, hard_score=None),
    line("random", 0.055, seed=0, score=0.4),
    line("random", 0.055, seed=1, score=0.6),
    line(COMPOSED, 0.5),
    line(COMPOSED, 0.055, gain_ci=[-0.2, 0.0]),
    refused("fastv[x]", 0.5, "unsupported", "this method needs attention"),
    refused("fastv[x]", 0.055, "unsupported", "this method needs attention"),
    refused("pdrop", 0.055, "under its floor", "it keeps more than 5.5 %", floor=0.125),
]
TIMES = {"full-1.0-None": Latency(12.3456, 1.0), f"{COMPOSED}-0.5-None": Latency(0.00456, None)}


@pytest.fixture(scope="module")
def text():
    console = Console(width=80, file=io.StringIO())
    console.print(terminal_table(LINES, TIMES))
    return console.file.getvalue()


def test_every_name_is_whole_and_nothing_is_cut(text):
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    names = [row[: row.index("  ")] if "  " in row else row for row in text.splitlines()]
    assert COMPOSED.replace(" ", "") in "".join(names).replace(" ", "")
    assert any(name.startswith("fastv[x]") for name in names)


def test_a_line_has_the_numbers_of_a_method_at_a_budget(text):
    rows = [row.split() for row in text.splitlines()]
    (full,) = (row for row in rows if row[:1] == ["full"])
    assert full[1:] == ["100.0", "–", "–", "100.0", "2880.0", "50", "12346"]
    (random,) = (row for row in rows if row[:1] == ["random"])
    assert random[1:] == ["5.5", "%", "50.0", "±14.1", "≈", "−12.3", "100.0", "100.0", "2880.0", "50", "–"]
    half, few = (row for row in rows if "%" in row and "100.0" in row and "random" not in row)
    assert half[-8:] == ["100.0", "≈", "−12.3", "100.0", "100.0", "2880.0", "50", "4.56"]
    assert few[few.index("%") - 1 :] == ["5.5", "%", "100.0", "−12.3", "100.0", "100.0", "2880.0", "50", "–"]


def test_reasons_name_the_method_and_its_budgets_once(text):
    assert Reasons(LINES).texts == [
        "fastv[x] at 50 %, 5.5 %: unsupported: this method needs attention",
        "pdrop at 5.5 %: under its floor (12.5%): it keeps more than 5.5 %",
    ]
    assert text.count("see [1]") == 2 and text.count("see [2]") == 1
    assert "[1] fastv[x] at 50 %, 5.5 %: unsupported: this method needs attention\n" in text


def test_without_a_smaller_image_its_columns_are_left_out():
    console = Console(width=80, file=io.StringIO())
    console.print(terminal_table([row | {"gain": None, "hard_score": None} for row in LINES], TIMES))
    text = console.file.getvalue()
    assert "gain" not in text and "hard" not in text and "loyal" in text
    assert max(map(len, text.splitlines())) <= 80
