# SPDX-License-Identifier: Apache-2.0
"""The runner from outside: what it writes, what it resumes, what it refuses."""

import gzip
import io
import signal
import subprocess
import sys
import time

import pytest
import tiny_eval
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from vtprune import certificate
from vtprune.cli import app
from vtprune.errors import ConfigError
from vtprune.eval.config import load_config
from vtprune.eval.results.formatting import flops
from vtprune.eval.results.records import cell_records, read_results
from vtprune.eval.running import estimate
from vtprune.eval.running.cells import expand
from vtprune.eval.running.measure import SHOWN
from vtprune.eval.running.runner import run

CONFIG = {
    "task": "tiny",
    "batch_size": 4,
    "keep_ratios": [0.5, 0.1],
    "methods": [
        {"name": "random", "seeds": [0, 1]},
        "uniform",
        {"name": "fastv", "positions": "original"},
        "divprune",
        [{"name": "divprune", "keep_ratio": 0.5}, {"name": "fastv", "layer": 1, "keep_ratio": 0.5}],
    ],
}
CELLS = 15  # full, zero, 2 downsample, 2 x 2 random, 3 x 2 others, the composed one


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
        ("divprune + fastv", 0.25, None),
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


def test_a_composed_row_runs_its_methods_in_one_session(finished):
    """8 of 16 tokens in the first layers, and so many in the others that 4 are left on average."""
    composed = cell(finished[1], "divprune + fastv", 0.25)
    assert composed["label"] == "divprune(keep_ratio=0.5) + fastv(keep_ratio=0.5, layer=1)"
    assert composed["measured_keep_ratio"] == pytest.approx(0.25, abs=0.05)
    assert composed["final_tokens"] < 4 < cell(finished[1], "divprune", 0.5)["final_tokens"]
    assert [(part["name"], part["keep_ratio"]) for part in composed["params"]["parts"]] == [
        ("divprune", 0.5),
        ("fastv", 0.5),
    ]


def test_seeds_draw_different_tokens_and_their_records_say_what_was_answered(finished):
    output, _ = finished
    predictions = []
    for seed in (0, 1):
        records = cell_records(output, cell(finished[1], "random", 0.1, seed)["cell"])
        assert [record["index"] for record in records] == list(range(tiny_eval.EXAMPLES))
        predictions.append([record["prediction"] for record in records])
    assert predictions[0] != predictions[1]


def test_a_budget_under_the_floor_is_a_status_and_never_a_score(finished):
    output, results = finished
    under = cell(results, "fastv", 0.1)
    assert (under["status"], under["n"], under["floor"]) == ("under its floor", 0, 0.125)
    assert under["score"] is under["ci"] is under["prefill_flops"] is None and "12.5%" in under["reason"]
    assert cell(results, "fastv", 0.5)["status"] == "ok"
    lines = (output / "summary.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| fastv"))
    assert row.rstrip(" |").endswith("*under its floor (12.5%) [1]*")
    (note,) = (line for line in lines if line.startswith("- [1] "))
    assert note == f"- [1] {under['label']} at 10 %: under its floor (12.5%): {under['reason']}"


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
    killed = []
    for wanted in (13, 71):  # records on disk before the run is killed
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while tiny_eval.examples_on_disk(tmp_path) < wanted and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
        assert not (tmp_path / "results.jsonl").exists()
        killed.append(tiny_eval.examples_on_disk(tmp_path))
    last = max((tmp_path / "cells").iterdir(), key=lambda path: path.stat().st_mtime)
    with last.open("ab") as file:  # and a batch torn by the kill
        file.write(gzip.compress(b'{"index": 4, "question": "wh')[:-9])

    run(load_config(config_file, output=tmp_path))

    assert killed == sorted(killed) and killed[-1] < CELLS * tiny_eval.EXAMPLES * 0.8
    assert tiny_eval.files(tmp_path) == tiny_eval.files(output)


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
    with tiny_eval.held(tmp_path / ".lock"), pytest.raises(ConfigError, match="another evaluation is running"):
        run(load_config(config_file, output=tmp_path))


def test_a_disk_that_takes_no_more(finished, config_file, tmp_path):
    output, _ = finished
    command = f"{sys.executable} {tiny_eval.__file__} eval {config_file} --output {tmp_path}"
    # No file may grow over 8 KiB, and one has nearly that, so that the run ends with a write that fails half-way.
    (tmp_path / "timings.jsonl").write_text("\n" * (8 * 1024 - 1500))
    full = subprocess.run(["bash", "-c", f"ulimit -f 8; {command}"], capture_output=True, text=True)
    assert full.returncode == 2
    assert "cannot be written: File too large; what is finished is kept" in full.stderr
    assert "Traceback" not in full.stderr
    assert not (tmp_path / "results.jsonl").exists()
    assert not list(tmp_path.rglob("*.part"))
    kept = tiny_eval.examples_on_disk(tmp_path)
    assert kept > tiny_eval.EXAMPLES

    run(load_config(config_file, output=tmp_path))
    assert tiny_eval.files(tmp_path) == tiny_eval.files(output)


def test_several_models_and_tasks(finished, model, config_file, tmp_path):
    other = tiny_eval.save_model(tmp_path / "other", seed=1)
    config = load_config(config_file, {"model": [model, str(other)], "task": ["tiny", "tiny again"]}, output=tmp_path)
    results = run(config)
    assert [(r["model"], r["task"]) for r in results[::CELLS]] == [
        (own, task) for own in (model, str(other)) for task in ("tiny", "tiny again")
    ]
    assert len({r["cell"] for r in results}) == len(results) == 4 * CELLS
    alone = [r | {"config": None} for r in finished[1]]
    assert [r | {"config": None} for r in results[:CELLS]] == alone
    assert [r["score"] for r in results[2 * CELLS :][:CELLS]] != [r["score"] for r in alone]
    assert results[CELLS]["config"]["task"] == "tiny again"
    summary = (tmp_path / "summary.md").read_text()
    for number, (own, task) in enumerate([(model, "tiny"), (model, "tiny again"), (other, "tiny")], start=1):
        assert f"# {task}: {own}, 10 examples" in summary
        assert (
            len(list(tmp_path.glob(f"pareto-{number}-*.png"))) == len(list(tmp_path.glob(f"families-{number}-*"))) == 1
        )


def test_the_full_model_is_not_run_again_for_another_grid(config_file, tmp_path):
    run(load_config(config_file, {"methods": []}, output=tmp_path))
    before = (tmp_path / "timings.jsonl").read_text()
    run(load_config(config_file, {"methods": ["uniform"]}, output=tmp_path))
    added = (tmp_path / "timings.jsonl").read_text().removeprefix(before).splitlines()
    assert added and all("uniform" in line for line in added)


def test_what_a_dry_run_says_is_what_is_measured_later(finished, config_file, monkeypatch):
    _, results = finished
    config = load_config(config_file)
    monkeypatch.setattr(estimate, "_EXAMPLES", tiny_eval.EXAMPLES)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)  # no weights
    (table,) = estimate.estimate_tables(config)
    columns = [list(column.cells) for column in table.columns]
    for result, title, tokens, cost, share in zip(results, *columns, strict=True):
        assert title.startswith(result["label"])
        if result["status"] != "ok":
            assert (tokens, cost) == ("", "[dim]under its floor (12.5%) [1][/dim]")
            assert f"[1] {result['reason']}" in table.caption
        else:
            assert tokens == f"{result['average_tokens']:.1f}"
            assert cost == flops(result["prefill_flops"])
            assert share == f"{result['prefill_flops'] / result['unpruned_prefill_flops']:.1%}"


def test_what_only_a_run_decides_has_no_number_in_a_dry_run(config_file):
    """A method that needs whole images, behind one that drops tokens; and a language model unknown to the tests."""
    pooled = [{"name": "divprune", "keep_ratio": 0.5}, {"name": "pool", "keep_ratio": 0.5}]
    config = load_config(config_file, {"methods": [pooled, "fastv"], "keep_ratios": [0.5], "baselines": ["full"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificate, "TESTED_TEXT_MODELS", frozenset())
        (table,) = estimate.estimate_tables(config)
    _, tokens, cost, _ = ([*column.cells] for column in table.columns)
    assert tokens == ["16.0", "", ""]
    assert cost[1:] == [f"[dim]decided when it runs [{number}][/dim]" for number in (1, 2)]
    assert "[2] whether attention can be recomputed for a LlamaDecoderLayer" in table.caption


def test_names_of_cells_are_whole_at_80_columns(config_file):
    config = load_config(config_file, {"methods.4.1.layer": 2}, limit=2)
    (table,) = estimate.estimate_tables(config)
    with io.StringIO() as file:
        Console(file=file, width=80).print(table)
        lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    names = "".join(line.split("│")[1].strip() for line in lines if line.startswith("│"))
    for cell in expand(config):
        assert cell.title.replace(" ", "") in names.replace(" ", "")


def test_a_dry_run_writes_nothing(config_file, tmp_path):
    output = tmp_path / "output"
    options = ["--dry-run", "--output", str(output), "--set", "keep_ratios=[0.3]", "--set", "methods.2.layer=2"]
    result = CliRunner().invoke(app, ["eval", str(config_file), *options])
    assert result.exit_code == 0, result.output
    assert "9 cells" in result.stdout and "random 0.3 seed1" in result.stdout
    assert "layer=2" in result.stdout
    assert not output.exists()


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
