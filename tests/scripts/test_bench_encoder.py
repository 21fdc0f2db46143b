# SPDX-License-Identifier: Apache-2.0
"""The benchmark of encoders: what is promised, what is timed, and its table."""

import pytest
import torch

SCRIPT = "bench_encoder"
TINY = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "image_size": 98,
    "patch_size": 7,
}


@pytest.fixture
def tiny(script):
    return script.build(TINY), torch.randn(2, 3, 98, 98, generator=torch.Generator().manual_seed(0))


def test_promises_are_those_of_the_report(script, tiny):
    model, pixels = tiny
    assert script.promised(model, pixels, None) == (1.0, 196)
    speedup, left = script.promised(model, pixels, {"name": "tome", "r": 8})
    assert left == 196 - 12 * 8 and 1.2 < speedup < 196 / left


def test_a_round_times_the_choices_within_the_encoder(script, tiny):
    model, pixels = tiny
    total, choosing = script.one_round(model, pixels, None)
    assert total > 0 and choosing == 0.0
    total, choosing = script.one_round(model, pixels, {"name": "tome", "r": 8})
    assert 0 < choosing < total
    reduce = script.vtprune.ToMe.reduce
    script.one_round(model, pixels, {"name": "tome", "r": 8})
    assert script.vtprune.ToMe.reduce is reduce, "the stopwatch stays on the method"


def test_the_table_has_every_row(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr(script.console, "width", 200)
    script.main(shape="tiny", batch=2, rounds=1, linear=script.Linear.TORCH)
    printed = capsys.readouterr().out
    for label in script.ROWS:
        assert label in printed
    with pytest.raises(script.typer.BadParameter, match="tiny"):
        script.main(shape="huge", batch=2, rounds=1, linear=script.Linear.TORCH)
