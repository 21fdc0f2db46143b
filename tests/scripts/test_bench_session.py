# SPDX-License-Identifier: Apache-2.0
"""The benchmark of sessions: what is compared with what, and its tables. No time is tested."""

import io

import pytest
import torch
from rich.console import Console

import vtprune

SCRIPT = "bench_session"
LAYERS = 4


@pytest.fixture
def printed(script, monkeypatch):
    """What the script prints."""
    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(script, "console", console)
    return console.file


@pytest.fixture(autouse=True)
def _fast(one_thread):
    with torch.inference_mode():
        yield


def test_the_plain_model_has_the_columns_that_the_session_has_left(script):
    model = script.build(LAYERS)
    inputs = script.with_images(model, 2)
    whole = inputs["input_ids"].shape[1]
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 2 * (whole - script.TEXT)
    assert inputs["attention_mask"].sum(1).tolist() == [whole, whole - 1]
    with vtprune.prune(model, script.ROWS["fastv"]):
        answer = script.Answer(model, inputs)
        assert answer.columns() < whole and answer.cache.get_seq_length() == whole
    plain = script.Answer(script.build(LAYERS), script.of_text(2, answer.columns()))
    assert plain.cache.get_seq_length() == answer.columns()


def test_a_step_adds_a_token(script):
    model = script.build(LAYERS)
    answer = script.Answer(model, script.of_text(2, 20))
    assert answer.step() > 0 and answer.step() > 0
    assert answer.cache.get_seq_length() == 22 and answer.places.tolist() == [[21], [20]]


def test_things_take_turns(script):
    calls = []
    plain, pruned = (lambda: calls.append("plain") or 1.0), (lambda: calls.append("session") or 3.0)
    assert script.in_turns(plain, pruned, 3) == (1.0, 3.0) and calls == ["plain", "session"] * 3


def test_ratios_are_those_of_rounds(script, printed):
    rounds = iter([(1.0, 1.0), (10.0, 20.0), (2.0, 6.0)])
    script.console.print(script.table_of("title", {"row": lambda: next(rounds)}, 3))
    assert "row" in printed.getvalue() and "2.000x" in printed.getvalue()


def test_tables_have_a_line_for_each_row(script, printed):
    script.decode(LAYERS, rounds=1, steps=1)
    script.idle(LAYERS, rounds=1, steps=1)
    script.requests(LAYERS, count=5)
    text = printed.getvalue()
    for label in script.ROWS:
        assert text.count(f" {label} ") >= 2, label
    assert "keep_ratio=1, prefill" in text and text.count("MiB") == 15
