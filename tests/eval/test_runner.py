# SPDX-License-Identifier: Apache-2.0
"""The runner from outside: what it writes, what it resumes, what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_eval
import yaml
from filelock import FileLock

from vtprune.errors import ConfigError
from vtprune.eval.config import load_config
from vtprune.eval.measure import SHOWN
from vtprune.eval.results import cell_records, read_results
from vtprune.eval.runner import run

CONFIG = {
    "task": "tiny",
    "batch_size": 4,
    "keep_ratios": [0.5, 0.1],
    "methods": [{"name": "random", "seeds": [0, 1]}, "uniform", {"name": "fastv", "positions": "original"}, "divprune"],
}
CELLS = 14  # full, zero, 2 downsample, 2 x 2 random, 3 x 2 others


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_eval.save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def config_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump({"model": model, **CONFIG}))
    return path


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    """An uninterrupted run: its folder and its lines."""
    output = tmp_path_factory.mktemp("finished")
    return output, run(load_config(config_file, output=output))


def cell(results, method, ratio, seed=None):
    (found,) = (r for r in results if (r["method"], r["keep_ratio"], r["seed"]) == (method, ratio, seed))
    return found


def test_one_line_a_cell_in_the_order_of_the_configuration(finished):
    output, results = finished
    assert read_results(output / "results.jsonl") == results
    assert [(r["method"], r["keep_ratio"], r["seed"]) for r in results] == [
        ("full", 1.0, None),
        ("zero", 0.0, None),
        ("downsample", 0.5, None),
        ("downsample", 0.1, None),
        *(("random", ratio, seed) for ratio in (0.5, 0.1) for seed in (0, 1)),
        *((name, ratio, None) for name in ("uniform", "fastv", "divprune") for ratio in (0.5, 0.1)),
    ]


def test_numbers_of_a_cell(finished):
    _, results = finished
    full, half = cell(results, "full", 1.0), cell(results, "divprune", 0.5)
    assert full["n"] == half["n"] == tiny_eval.EXAMPLES
    assert full["measured_keep_ratio"] == full["retention"] == 1.0
    assert full["retention_ci"] == [1.0, 1.0]
    assert (full["final_tokens"], half["final_tokens"], half["measured_keep_ratio"]) == (16, 8, 0.5)
    assert half["prefill_flops"] < half["unpruned_prefill_flops"] == full["prefill_flops"]
    assert half["kv_bytes"] < half["unpruned_kv_bytes"] == full["kv_bytes"]
    assert 0 <= half["ci"][0] <= half["score"] <= half["ci"][1] <= 1
    assert half["retention"] == pytest.approx(half["score"] / full["score"])
    assert set(half["family_scores"]) == {"family 0", "family 1"}
    assert half["score"] == pytest.approx(sum(half["family_scores"].values()) / 2)
    assert half["versions"]["transformers"] and half["config"]["batch_size"] == 4
    assert cell(results, "fastv", 0.5)["params"]["positions"] == "original"
    assert cell(results, "zero", 0.0)["final_tokens"] == 0


def test_seeds_draw_different_tokens_and_their_records_say_what_was_answered(finished):
    output, _ = finished
    predictions = []
    for seed in (0, 1):
        (path,) = (output / "cells").glob(f"random-0.1-seed{seed}-*.jsonl")
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert [record["index"] for record in records] == list(range(tiny_eval.EXAMPLES))
        predictions.append([record["prediction"] for record in records])
    assert predictions[0] != predictions[1]


def test_a_budget_under_the_floor_is_a_status_and_never_a_score(finished):
    output, results = finished
    under = cell(results, "fastv", 0.1)
    assert (under["status"], under["n"], under["floor"]) == ("under its floor", 0, 0.125)
    assert under["score"] is under["ci"] is under["prefill_flops"] is None and "12.5%" in under["reason"]
    assert cell(results, "fastv", 0.5)["status"] == "ok"
    row = next(line for line in (output / "summary.md").read_text().splitlines() if line.startswith("| fastv"))
    assert row.rstrip(" |").endswith("*under its floor (12.5%)*")


def test_downsample_runs_on_as_many_tokens_as_it_says(finished):
    _, results = finished
    half, tenth = cell(results, "downsample", 0.5), cell(results, "downsample", 0.1)
    assert (half["final_tokens"], tenth["final_tokens"]) == (9, 2)  # grids of 3 x 3 and 1 x 2 out of 4 x 4
    assert (half["measured_keep_ratio"], tenth["measured_keep_ratio"]) == (9 / 16, 2 / 16)
    assert tenth["prefill_flops"] < half["prefill_flops"] < half["unpruned_prefill_flops"]


def test_the_folder_holds_a_summary_and_a_plot(finished):
    output, results = finished
    summary = (output / "summary.md").read_text()
    for record in results:
        assert f"| {record['label']} |" in summary
    assert results[0]["versions"]["torch"] in summary
    for plot in ("pareto.png", "families.png"):
        assert (output / plot).read_bytes().startswith(b"\x89PNG")


def test_killed_and_started_again_gives_the_same_file(finished, config_file, tmp_path):
    output, _ = finished
    command = [sys.executable, tiny_eval.__file__, "eval", str(config_file), "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(tiny_eval.__file__).parent)}
    killed = []
    for wanted in (13, 71):  # records on disk before the run is killed
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
        while examples_on_disk(tmp_path) < wanted and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
        assert not (tmp_path / "results.jsonl").exists()
        killed.append(examples_on_disk(tmp_path))
    last = max((tmp_path / "cells").iterdir(), key=lambda path: path.stat().st_mtime)
    with last.open("ab") as file:  # and a line torn by the kill
        file.write(b'{"index": 4, "question": "wh')

    run(load_config(config_file, output=tmp_path))

    assert killed == sorted(killed) and killed[-1] < CELLS * tiny_eval.EXAMPLES * 0.8
    assert (tmp_path / "results.jsonl").read_bytes() == (output / "results.jsonl").read_bytes()
    for path in (output / "cells").iterdir():
        assert (tmp_path / "cells" / path.name).read_bytes() == path.read_bytes()


def examples_on_disk(output):
    return sum(path.read_bytes().count(b"\n") for path in output.glob("cells/*.jsonl"))


def test_a_finished_folder_is_not_run_again(finished, config_file):
    output, results = finished
    before = (output / "timings.jsonl").read_bytes()
    assert run(load_config(config_file, output=output)) == results
    assert (output / "timings.jsonl").read_bytes() == before


def test_another_configuration_in_the_same_folder_is_not_mixed_in(config_file, tmp_path):
    first = run(load_config(config_file, output=tmp_path, limit=4))
    again = run(load_config(config_file, output=tmp_path, limit=8))
    assert {r["n"] for r in first if r["status"] == "ok"} == {4}
    assert {r["n"] for r in again if r["status"] == "ok"} == {8}
    assert len(again) == CELLS


def test_two_runs_in_one_folder(config_file, tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(ConfigError, match="another evaluation is running"):
        run(load_config(config_file, output=tmp_path))


def test_a_model_that_cannot_be_loaded(config_file, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty.* cannot be loaded"):
        run(load_config(config_file, model=str(tmp_path / "empty"), output=tmp_path))


def test_records_of_the_first_examples_say_which_visual_tokens_were_kept(finished):
    output, results = finished
    records = cell_records(output, cell(results, "uniform", 0.5)["cell"])
    assert [len(record["kept"]) for record in records[:SHOWN]] == [8] * SHOWN
    assert all(set(record["kept"]) < set(range(16)) for record in records[:SHOWN])
    assert not any("kept" in record for record in records[SHOWN:])
    assert cell_records(output, cell(results, "full", 1.0)["cell"])[1]["kept"] == list(range(16))
