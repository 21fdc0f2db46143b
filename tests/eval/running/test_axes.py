# SPDX-License-Identifier: Apache-2.0
"""Precisions, back ends, devices and positions that are compared: what is run, what is named, and what is loaded."""

import re
import weakref

import pytest
import tiny_eval
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from vtprune.cli import app
from vtprune.errors import ConfigError
from vtprune.eval.config import load_config
from vtprune.eval.pages.report import write_report
from vtprune.eval.results.compare import compare
from vtprune.eval.results.finished import comparisons
from vtprune.eval.results.records import cell_records
from vtprune.eval.running import devices, questions
from vtprune.eval.running.cells import expand
from vtprune.eval.running.devices import place_of, with_devices
from vtprune.eval.running.processes import Processes
from vtprune.eval.running.runner import run

GRID = {"task": "tiny", "limit": 6, "keep_ratios": [0.5], "baselines": ["full"], "methods": ["uniform"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_eval.save_model(tmp_path_factory.mktemp("model")))


def write(folder, model, **changes):
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"model": model, **GRID, **changes}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def compared(model, tmp_path_factory):
    """A run of two precisions by two back ends on two tasks: its folder, its lines, and what it loaded."""
    output, loads, alive = tmp_path_factory.mktemp("compared"), [], []
    axes = {"task": ["tiny", "tiny again"], "dtype": ["float32", "bfloat16"], "attention": ["sdpa", "eager"]}
    with pytest.MonkeyPatch.context() as patch:
        load = questions.load_model

        def watched(*given):
            assert not any(model() is not None for model in alive)  # two would need twice the memory
            loads.append(given[1:])
            loaded = load(*given)
            alive.append(weakref.ref(loaded[0]))
            return loaded

        patch.setattr(questions, "load_model", watched)
        results = run(load_config(write(output, model, **axes), output=output / "out"))
    return output / "out", results, loads


def test_every_combination_is_a_study_with_its_own_full_model(compared):
    output, results, loads = compared
    combinations = [(dtype, attention) for dtype in ("float32", "bfloat16") for attention in ("sdpa", "eager")]
    assert loads == [(*combination, "cpu") for combination in combinations]  # once for both tasks
    assert [(line["axes"]["dtype"], line["axes"]["attention"], line["task"]) for line in results[::2]] == [
        (*combination, task) for combination in combinations for task in ("tiny", "tiny again")
    ]
    assert [line["method"] for line in results] == ["full", "uniform"] * 8
    assert len({line["cell"] for line in results}) == 16
    for full in results[::2]:
        assert full["config"].items() >= {**full["axes"], "device": "cpu"}.items()
        assert full["retention"] == 1.0
    float32, bfloat16 = (line["kv_bytes"] for line in results[::8])
    assert float32 == 2 * bfloat16


def test_tables_plots_and_pages_name_the_values(compared):
    output, _, _ = compared
    summary = (output / "summary.md").read_text()
    titles = [line for line in summary.splitlines() if line.startswith("# ")]
    assert len(titles) == len(set(titles)) == 8
    assert titles[2].endswith(", dtype float32, attention eager, 6 examples") and "device" not in titles[2]
    names = {path.name for path in output.glob("pareto*")}
    assert len(names) == 8 and any(re.fullmatch(r"pareto-3-tiny-model\d+-float32-eager\.png", name) for name in names)
    write_report([output], output / "report.html")
    page = (output / "report.html").read_text()
    assert page.count(", dtype bfloat16, attention sdpa</h2>") == 2  # of two tasks


def test_runs_are_compared_under_the_same_values(compared, model, tmp_path):
    output, results, _ = compared
    found = comparisons([output])
    assert len(found) == 8 and all(len(comparison.lines) == 2 for comparison in found)
    names = [pair.first.name for pair in compare(output, output).pairs]
    assert len(names) == len(set(names)) == 16
    assert "tiny, dtype bfloat16, attention eager: uniform at 50 %" in names


def test_a_single_value_is_named_nowhere_and_shares_its_cells(compared, model, tmp_path):
    """The cells of a run with axes are found by a run without them."""
    output, results, _ = compared
    alone = run(load_config(write(tmp_path, model, attention="eager", dtype=["bfloat16"]), output=output / "alone"))
    twin = [line for line in results if line["axes"] == {"dtype": "bfloat16", "attention": "eager"}][:2]
    assert [line["cell"] for line in alone] == [line["cell"] for line in twin]
    assert [line | {"config": None} for line in alone] == [
        {key: value for key, value in line.items() if key != "axes"} | {"config": None} for line in twin
    ]
    assert (output / "alone" / "pareto.png").exists()
    assert "bfloat16" not in (output / "alone" / "summary.md").read_text().splitlines()[0]


def test_positions_are_rows_of_the_methods_that_have_the_choice(model, tmp_path):
    methods = [
        "uniform",
        {"name": "fastv", "positions": "original"},
        {"preset": "mmtok/llava-1.5-7b/64"},
        "lazyllm",
        ["divprune", {"name": "fastv", "positions": "compact"}],
    ]
    methods[-1][0] = {"name": "divprune", "keep_ratio": 0.8}
    both = load_config(write(tmp_path, model, methods=methods, positions=["original", "compact"]))
    titles = [cell.title for cell in expand(both)]
    assert titles == [
        "full",
        "uniform(positions=original) 0.5",
        "uniform(positions=compact) 0.5",
        "fastv(positions=original) 0.5",
        "mmtok/llava-1.5-7b/64",
        "lazyllm(positions=original) 0.5",
        "divprune(keep_ratio=0.8, positions=original) + fastv(positions=compact)",
        "divprune(keep_ratio=0.8, positions=compact) + fastv(positions=compact)",
    ]
    one = load_config(write(tmp_path, model, methods=["uniform", "fastv"], positions="original"))
    cells = expand(one)[1:]
    assert [cell.title for cell in cells] == ["uniform 0.5", "fastv 0.5"]
    assert [cell.params["positions"] for cell in cells] == ["original", "original"]
    with pytest.raises(ConfigError, match="positions: lazyllm cannot have compact; give the row positions of its own"):
        expand(load_config(write(tmp_path, model, methods=["lazyllm"], positions="compact")))


def test_rows_of_positions_have_different_answers_beside_one_full_model(model, tmp_path):
    results = run(load_config(write(tmp_path, model, positions=["original", "compact"]), output=tmp_path / "out"))
    assert [line["label"] for line in results] == ["full", "uniform(positions=original)", "uniform(positions=compact)"]
    original, compact = (cell_records(tmp_path / "out", line["cell"]) for line in results[1:])
    assert [record["kept"] for record in original] == [record["kept"] for record in compact]
    assert [record["prediction"] for record in original] != [record["prediction"] for record in compact]
    assert "axes" not in results[0]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"dtype": ["float32", "float8"]}, "key 'dtype.1': expected 'float32', 'bfloat16' or 'float16', got 'float8'"),
        ({"dtype": []}, "key 'dtype': expected one value, or a list of different ones"),
        ({"attention": ["sdpa", "sdpa"]}, "key 'attention': expected one value, or a list of different ones"),
        ({"device": "gpu"}, "key 'device': expected auto, cpu, cuda, cuda:1, mps or xpu, got 'gpu'"),
        ({"positions": ["original", "odd"]}, "key 'positions.1': expected 'original' or 'compact', got 'odd'"),
        ({"device": "cpu", "device_map": "auto"}, "key 'device_map': it takes all accelerators; leave 'device' out"),
        ({"attention": ["sdpa", "flash_attention_2"]}, "key 'attention': flash_attention_2 computes in bfloat16 or"),
    ],
)
def test_what_is_wrong_with_an_axis(model, tmp_path, changes, problem):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, model, **changes))
    assert problem in str(caught.value) and "grid.yaml, line" in str(caught.value)


def test_a_task_of_classes_has_no_positions_and_no_map(tmp_path):
    for changes in ({"positions": "original"}, {"device_map": "auto"}):
        config = write(tmp_path, "digitscenes_clip", task="digitscenes_digits", methods=["tome"], **changes)
        with pytest.raises(ConfigError, match=f"{next(iter(changes))}: only for models that answer questions"):
            run(load_config(config))


# -- devices ----------------------------------------------------------------------------------------------------------


def test_auto_is_an_accelerator_if_there_is_one(model, tmp_path, monkeypatch):
    config = load_config(write(tmp_path, model))
    assert config.device == "auto" and with_devices(config).device == "cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(devices, "check_device", lambda device: None)
    assert with_devices(config).device == "mps"
    listed = load_config(write(tmp_path, model, device=["auto", "cpu"]))
    assert with_devices(listed).device == ("mps", "cpu")
    twice = load_config(write(tmp_path, model, device=["auto", "mps"]))
    with pytest.raises(ConfigError, match="device: 'auto' is 'mps' on this machine, and the list has that, too"):
        with_devices(twice)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is the device that is to be missing")
@pytest.mark.parametrize("command", [["--dry-run"], []])
def test_a_device_that_is_not_there_is_one_error_before_anything_is_loaded(model, tmp_path, command):
    path = write(tmp_path, model, device=["cpu", "cuda"])
    result = CliRunner().invoke(app, ["eval", str(path), "--output", str(tmp_path / "out"), *command])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: device 'cuda' cannot be used: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_says_first_what_it_takes_and_then_a_line_when_a_cell_begins_and_ends(model, tmp_path):
    config = load_config(write(tmp_path, model, methods=["fastv"], keep_ratios=[0.5, 0.1]), output=tmp_path / "out")
    with (tmp_path / "log").open("w") as file:
        results = run(config, Console(file=file, width=40))
        run(config, Console(file=file))  # which has nothing left to do
    first, *lines, last = (tmp_path / "log").read_text().splitlines()
    taken = "device cpu, dtype float32, attention sdpa"
    assert first == last == taken
    titles = ["full", "fastv 0.5", "fastv 0.1"]
    names = [f"[{number}/3] tiny, {model}: {title}: " for number, title in enumerate(titles, start=1)]
    assert lines[0::2] == [f"{name}begins, 6 examples" for name in names]
    for line, name, result in zip(lines[1::2], names, results, strict=True):
        assert line.startswith(name)
        ok = result["status"] == "ok"
        assert line.endswith(f"s, score {result['score']:.4g}" if ok else "s, under its floor (12.5%)")
        assert f": {6 if ok else 0} examples in " in line


def test_a_terminal_has_a_bar_instead_of_lines(model, tmp_path):
    config = load_config(write(tmp_path, model), output=tmp_path / "out")
    with (tmp_path / "log").open("w") as file:
        run(config, Console(file=file, force_terminal=True, width=200))
    said = (tmp_path / "log").read_text()
    assert "begins" not in said and "12/12" in said


def test_layers_that_are_spread_are_counted(model):
    from types import SimpleNamespace

    alone = SimpleNamespace(device=torch.device("cpu"))
    assert place_of(alone) == "cpu"
    spread = SimpleNamespace(device=torch.device("cpu"), hf_device_map={"a": "cpu", "b": "disk", "c": "disk"})
    assert place_of(spread) == "cpu (1 parts), disk (2 parts)"


def test_a_device_map_is_for_one_process(model, tmp_path, monkeypatch):
    config = with_devices(load_config(write(tmp_path, model, device_map="auto")))
    assert run(config.model_copy(update={"output": tmp_path / "out"}))[0]["config"]["device_map"] == "auto"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="device_map takes all accelerators for one process; there are 2"):
        Processes.start(config)
