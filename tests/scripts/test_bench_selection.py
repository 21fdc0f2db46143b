# SPDX-License-Identifier: Apache-2.0
"""The benchmark compares like with like: both sides choose the same, and its figures are what they say."""

import time

import pytest
import torch
from rich.table import Table

import vtprune
from vtprune.ops.bipartite_merging import bipartite_merging
from vtprune.ops.coverage import max_coverage
from vtprune.ops.segmentation import segment_frames

SCRIPT = "bench_selection"


@pytest.mark.parametrize("k", [1, 3, 20, 39, 40])
def test_greedy_selections_are_the_same(script, k):
    inputs = script.image_like(40, text_tokens=5, dim=16)
    assert torch.equal(script.dense_coverage(*inputs, k), max_coverage(*inputs, k))
    assert torch.equal(script.dense_diversity(inputs[0], k), script.greedy_diversity(inputs[0], k))


@pytest.mark.parametrize("frames", [2, 9, 60])
def test_segmentations_are_the_same(script, frames):
    still = script.clip_like(frames, positions=30)
    assert torch.equal(script.tabled_segmentation(still), segment_frames(still)[0])


@pytest.mark.parametrize(("n", "clusters"), [(20, 7), (60, 9)])
def test_clusterings_are_the_same(script, n, clusters):
    points = script.image_like(n, dim=12)[0]
    assert torch.equal(script.looped_clustering(points, clusters), script.batched_clustering(points, clusters))


@pytest.mark.parametrize(("n", "k"), [(2, 1), (31, 31), (31, 20), (31, 4), (196, 3)])
def test_mergings_are_the_same(script, n, k):
    frames = script.image_like(5 * n, dim=24)[0].view(5, n, -1)
    left = script.tabled_merging(frames, k)
    assert left.shape == (5, k)
    assert torch.equal(left, bipartite_merging(frames, k).places)


def test_a_row_holds_times_ratio_agreement_and_memory(script):
    table = Table(*"abcdefgh")

    def slow():
        time.sleep(0.05)
        return torch.arange(1 << 18).sort().indices[:3]

    script.compare(table, "step", "3", lambda: torch.arange(3), slow, repeats=2, memory=True)
    script.compare(table, "step", "3", lambda: torch.arange(3), lambda: torch.ones(3), repeats=1)
    cells = [list(column.cells) for column in table.columns]
    assert float(cells[2][0].removesuffix(" ms")) >= 50
    assert float(cells[4][0].removesuffix(" x").replace(",", "")) > 10
    assert cells[5] == ["yes", "[red]NO[/red]"]
    # A sort of 2^18 numbers holds 2 MiB each of numbers, sorted ones and indices.
    assert 6 <= float(cells[6][0].removesuffix(" MiB")) < 20
    assert cells[7][0] == "0.0 MiB"


def test_peak_memory_counts_what_is_there_at_once(script):
    def one_after_the_other():
        for _ in range(4):
            torch.zeros(1 << 20)

    def together():
        return [torch.zeros(1 << 20) for _ in range(4)]

    assert script.peak_bytes(one_after_the_other) == 4 << 20
    assert script.peak_bytes(together) == 16 << 20


def test_the_merging_part_runs(script, capsys, monkeypatch):
    """At a fraction of its sizes."""
    clip_like, image_like = script.clip_like, script.image_like
    monkeypatch.setattr(script, "clip_like", lambda frames: clip_like(frames // 16))
    monkeypatch.setattr(script, "image_like", lambda n, dim: image_like(n, dim=dim // 28))
    monkeypatch.setattr(script, "console", script.Console(width=160))
    script.main(repeats=1, part=script.Part.MERGING)
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "yes" in line]
    assert [sum(step in row for row in rows) for step in ("segment_frames", "density_peaks", "bipartite_merging")] == [
        2,
        2,
        3,
    ]
    assert all(row.count(" ms ") == 2 and row.count(" MiB ") == 2 and " x " in row for row in rows)
    assert not any("NO" in line for line in lines)


def test_methods_choose_what_was_recorded(script):
    """A group of 576 tokens, and ragged groups; the longer ones are for the benchmark."""
    made_up = script.made_up
    for label in ("576", "ragged"):
        data = made_up.MadeUp(made_up.CASES[label])
        for name, method in made_up.methods_before_llm(data.case):
            selection = method.choose(data.tokens(method))
            assert made_up.same_as_recorded(label, name, selection) == "yes", (label, name)


def test_a_choice_that_differs_is_told_from_the_recorded_one(script):
    made_up = script.made_up
    data = made_up.MadeUp(made_up.CASES["576"])
    (method,) = (method for name, method in made_up.methods_before_llm(data.case) if name == "divprune")
    keep = method.choose(data.tokens(method)).keep
    assert torch.equal(made_up.unpacked(made_up.packed(keep), keep.shape), keep)
    first, last = keep[0].nonzero()[[0, -1], 0].tolist()
    keep[0, first], keep[0, first + 1 if not keep[0, first + 1] else last + 1] = False, True
    assert made_up.same_as_recorded("576", "divprune", vtprune.Selection(keep)) == "NO: 1 of 63 others"
