# SPDX-License-Identifier: Apache-2.0
"""Times of batches become the latency of a cell; they are written as they were measured."""

import json
from types import SimpleNamespace

import pytest
import torch

from vtprune.eval.results.timings import Latency, Spent, latencies
from vtprune.eval.running import clock


def test_latency_is_the_median_over_batches_and_the_last_time_counts(tmp_path):
    batches = [
        ("a", 0, 4, 9.0, 5.0),
        ("a", 0, 4, 2.0, 1.0),
        ("a", 4, 4, 1.0, 0.5),
        ("a", 8, 2, 2.0, 1.5),
        ("b", 0, 4, 8.0, None),
    ]
    lines = []
    for cell, first, examples, seconds, prefill in batches:
        spent = Spent(seconds, prefill).to_dict()
        lines.append(json.dumps({"cell": cell, "first": first, "examples": examples, **spent}) + "\n")
    (tmp_path / "timings.jsonl").write_text("".join(lines) + '{"cell": "b", "fir')
    assert latencies([tmp_path]) == {"a": Latency(0.5, 0.25), "b": Latency(2.0, None)}
    assert latencies([tmp_path])["b"].per_second == 0.5


def test_lines_of_versions_that_did_not_measure_the_prefill_are_read(tmp_path):
    old = '{"cell": "a", "first": 0, "examples": 2, "seconds": 3.0}\n'
    new = '{"cell": "a", "first": 2, "examples": 2, "seconds": 1.0, "prefill_seconds": 0.5}\n'
    (tmp_path / "timings.jsonl").write_text(old + new)
    assert latencies([tmp_path]) == {"a": Latency(1.0, None)}


def test_the_prefill_ends_with_the_first_call_and_the_answer_with_the_last(monkeypatch):
    """Each call sets the clock forward by 3 seconds; what is before them by 1, and what is behind them by 5."""
    seconds = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: seconds[0])

    class Model(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self):
            seconds[0] += 3
            return SimpleNamespace(logits=torch.zeros(1))

    model = Model()
    with clock.Stopwatch(model) as watch:
        seconds[0] += 1
        for _ in range(4):
            model()
        seconds[0] += 5
    assert watch.spent == Spent(13.0, 4.0)
    assert not model._forward_hooks
    with pytest.raises(ZeroDivisionError), clock.Stopwatch(model):
        model(1 / 0)
    assert not model._forward_hooks
