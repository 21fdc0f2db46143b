# SPDX-License-Identifier: Apache-2.0
"""`vtprune tune` from outside: what it writes, what takes it, how it resumes, what it refuses."""

import json
import signal
import subprocess
import sys
import time

import pytest
import tiny_eval
import tiny_tune
import torch
import yaml
from typer.testing import CliRunner

import vtprune
from vtprune.cli import app
from vtprune.errors import ConfigError
from vtprune.eval.config import load_config
from vtprune.eval.lmms.arguments import Arguments
from vtprune.eval.results.records import json_lines, members
from vtprune.eval.running.runner import run
from vtprune.eval.tasks import TASKS, Task
from vtprune.eval.tuning.candidates import Candidate, compositions, first_candidates, twins
from vtprune.eval.tuning.choice import front, why
from vtprune.eval.tuning.config import Goal, TuneConfig
from vtprune.eval.tuning.run import tune
from vtprune.methods import build_methods
from vtprune.support import why_not


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_eval.save_model(tmp_path_factory.mktemp("model")))


def config(model, output, goal=None, **more):
    goal = goal or Goal("flops", 0.6)
    return TuneConfig.of(goal, model=model, output=output, **{"task": "tiny", "batch_size": 2, **more})


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A command at a cost: its folder and what it found."""
    output = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        tiny_tune.few_methods(patch.setattr)
        return output, tune(config(model, output))


def test_the_choice_keeps_the_cost_and_has_the_highest_score(finished):
    _, outcome = finished
    found = outcome.found
    methods = [run for run in found.runs if run.candidate.is_method]
    assert found.complete and found.examples == 6
    assert all(run.sample.costs["flops"] <= 0.606 for run in methods)
    assert found.choice.sample.score == max(run.sample.score for run in methods)


def test_the_examples_held_out_chose_nothing(finished):
    output, outcome = finished
    assert outcome.held_out_of == len(outcome.held_out.scores) == 4
    held_out = {6, 8}  # first examples of the batches
    times = json_lines(output / "timings.jsonl")
    cells = {line["cell"] for line in times if line["first"] in held_out}
    assert len(cells) == 2  # the full model's and the choice's
    assert len({line["cell"] for line in times}) > 10


def test_tuned_yaml_is_taken_by_prune_eval_and_lmms_eval(finished, model, tmp_path):
    output, outcome = finished
    path = output / "tuned.yaml"
    (expected,) = (build_methods(outcome.found.choice.sample.cell.spec),)
    assert build_methods(path) == build_methods(str(path)) == expected
    assert Arguments.of({"pretrained": model, "method": f"@{path}"}).methods() == expected
    (tmp_path / "grid.yaml").write_text(
        yaml.safe_dump({"model": model, "task": "tiny", "keep_ratios": [0.5], "baselines": ["full"]})
        + f"methods: [{{file: {path}}}]\n"
    )
    line = run(load_config(tmp_path / "grid.yaml", output=tmp_path / "out"))[1]
    assert line["method"] == outcome.found.choice.sample.cell.method
    assert line["keep_ratio"] == outcome.found.choice.sample.cell.keep_ratio
    assert line["status"] == "ok"


def test_a_composition_is_a_file_and_a_row_too(tmp_path):
    pair = Candidate(({"name": "divprune"}, {"name": "fastv", "layer": 1})).setting(0.36)
    assert [part["keep_ratio"] for part in pair.spec] == [0.6, 0.6] and pair.keep_ratio == 0.36
    (tmp_path / "tuned.yaml").write_text(yaml.safe_dump(pair.spec))
    (tmp_path / "grid.yaml").write_text("model: digitscenes\nkeep_ratios: [0.5]\nmethods: [{file: tuned.yaml}]\n")
    (row,) = load_config(tmp_path / "grid.yaml").methods
    assert list(row.parts) == pair.spec


@pytest.mark.parametrize(
    "row, problem",
    [
        ("{file: nowhere.yaml}", "methods.0.file.*cannot be read"),
        ("{file: tuned.yaml, layer: 2}", "does not go with 'file'"),
    ],
)
def test_a_row_with_a_wrong_file(tmp_path, row, problem):
    (tmp_path / "tuned.yaml").write_text("{name: fastv, keep_ratio: 0.5}")
    (tmp_path / "grid.yaml").write_text(f"model: digitscenes\nkeep_ratios: [0.5]\nmethods: [{row}]\n")
    with pytest.raises(ConfigError, match=problem):
        load_config(tmp_path / "grid.yaml")


def test_the_text_says_what_was_chosen_and_why(finished):
    output, outcome = finished
    text = (output / "tune.txt").read_text()
    assert "chosen" in text and "Held out: on 4 other examples" in text
    assert all(line.split()[0] in text for line in why(outcome))
    assert (output / "tuned.yaml").read_text().startswith("# vtprune tune --flops 0.6 on tiny")


def test_nothing_is_computed_twice(finished, model, monkeypatch):
    output, outcome = finished
    tiny_tune.few_methods(monkeypatch.setattr)
    before = (output / "timings.jsonl").read_bytes()
    again = tune(config(model, output))
    assert (output / "timings.jsonl").read_bytes() == before
    assert again.found.choice.sample.scores == outcome.found.choice.sample.scores
    assert again.held_out.scores == outcome.held_out.scores


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_choice(model, tmp_path):
    options = ["--model", model, "--task", "tiny", "--flops", "0.6", "--batch-size", "2", "--limit", "8"]
    command = [sys.executable, tiny_tune.__file__, "tune", *options, "--output"]
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    while tiny_eval.examples_on_disk(tmp_path / "killed") < 40 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "tuned.yaml").exists()
    for name in ("killed", "whole"):
        subprocess.run([*command, str(tmp_path / name)], check=True, capture_output=True)
    for name in ("tuned.yaml", "tune.txt"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    batches = [(line["cell"], line["first"]) for line in json_lines(tmp_path / "killed" / "timings.jsonl")]
    assert len(set(batches)) == len(batches)


def test_the_time_is_kept_and_the_choice_is_measured_on_held_out_examples(model, tmp_path, monkeypatch):
    """On a clock that only scores move: 0.15 s an answer."""
    passed = [0.0]

    def slow_score(prediction, example):
        passed[0] += 0.15
        return tiny_eval.score(prediction, example)

    monkeypatch.setattr("vtprune.eval.tuning.measuring.monotonic", lambda: passed[0])
    monkeypatch.setattr("vtprune.eval.tuning.run.monotonic", lambda: passed[0])
    tiny_tune.few_methods(monkeypatch.setattr)
    monkeypatch.setitem(TASKS, "tiny", lambda: Task(tiny_eval.examples, slow_score, max_new_tokens=3))
    outcome = tune(config(model, tmp_path, minutes=0.15))
    assert passed[0] < 9 + 0.3  # a batch that has begun ends
    assert outcome.held_out is not None
    assert len(outcome.found.runs) < len(tiny_tune.FEW) + 1
    with pytest.raises(ConfigError, match="--time 0.0001 is over before the first examples were compared"):
        tune(config(model, tmp_path / "shorter", minutes=0.0001))


@pytest.fixture(scope="module")
def lmms_tasks(lmms_folder):
    return lmms_folder / "tasks"


@pytest.mark.parametrize("task", ["pairs", "choices"])
def test_a_task_of_lmms_eval(lmms_tasks, tmp_path, monkeypatch, task):
    tiny_tune.few_methods(monkeypatch.setattr)
    options = ["--model", "digitscenes", "--task", f"lmms:{task}", "--include-path", str(lmms_tasks), "--flops", "0.6"]
    arguments = ["tune", *options, "--limit", "12", "--batch-size", "2", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert f"{task}: scores are means over its documents" in result.stderr
    assert build_methods(str(tmp_path / "tuned.yaml"))
    scores = [record["score"] for path in (tmp_path / "cells").iterdir() for batch in members(path) for record in batch]
    assert len(scores) > 20 and set(scores) == {0.0, 1.0}  # of documents


def test_several_tasks_are_refused(lmms_tasks, tmp_path):
    with pytest.raises(ConfigError, match=r"several tasks \(.*pairs"):
        tune(config("digitscenes", tmp_path, task="lmms:both", include_path=lmms_tasks))


def test_without_a_sure_setting_there_is_no_file(model, tmp_path, monkeypatch):
    tiny_tune.few_methods(monkeypatch.setattr)
    options = ["--model", model, "--task", "tiny", "--retain", "0.99", "--batch-size", "2", "--output", str(tmp_path)]
    (tmp_path / "tuned.yaml").write_text("name: mmtok")
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["tune", *options])
    assert result.exit_code == 1, result.output
    assert "No setting is sure to keep at least 99 %" in result.output
    assert not (tmp_path / "tuned.yaml").exists()


@pytest.mark.parametrize(
    "given, problem",
    [
        ({}, "exactly one goal.*got none"),
        ({"retain": 0.9, "kv": 0.5}, "got --retain and --kv"),
        ({"retain": 98}, "--retain 98: expected a share between 0 and 1"),
        ({"latency": "2"}, "or seconds for each example: 0.8s"),
        ({"latency": "fast"}, "--latency fast"),
    ],
)
def test_a_goal_that_makes_no_sense(given, problem):
    with pytest.raises(ConfigError, match=problem):
        Goal.of(**given)


def test_seconds_are_a_goal_of_latency():
    assert Goal.of(latency="0.8s") == Goal("latency", 0.8, seconds=True)
    assert Goal.of(latency="0.8") == Goal("latency", 0.8)


def test_too_few_examples(model, tmp_path):
    with pytest.raises(ConfigError, match="has 10 examples in 2 batches of 8; tuning needs at least 3 batches"):
        tune(config(model, tmp_path, batch_size=8))


def test_a_task_of_classes_is_refused(model, tmp_path):
    wrong = TuneConfig.of(Goal("kv", 0.5), model=model, task="digitscenes_digits", output=tmp_path)
    with pytest.raises(ConfigError, match="vtprune tune is for tasks with questions"):
        tune(wrong)


def test_the_options_are_checked(model, tmp_path):
    with pytest.raises(ConfigError, match="--task: expected the name of a task"):
        TuneConfig.of(Goal("kv", 0.5), model=model, task="tinyy", output=tmp_path)
    with pytest.raises(ConfigError, match="--time 0: expected minutes"):
        config(model, tmp_path, minutes=0)


def test_candidates_are_what_the_model_supports():
    from vtprune.testing import families

    qwen = families.shared("qwen2_5_vl", "sdpa")
    found, refused = first_candidates(lambda spec: why_not(qwen, spec))
    names = {candidate.label for candidate in found}
    assert {"downsample", "random", "uniform", "pool", "mmtok", "fastv"} <= names
    assert "zero" not in names | refused.keys()
    assert "CLS token" in refused["vtc_cls"] and "vtc_cls" not in names


def test_compositions_pair_the_best_of_different_stages():
    ranked = [Candidate(({"name": name},)) for name in ("downsample", "mmtok", "fastv", "tome", "divprune", "dart")]
    pairs = [pair.label for pair in compositions(ranked, lambda spec: None)]
    assert pairs == ["tome + mmtok", "tome + divprune", "tome + fastv", "tome + dart", "mmtok + fastv", "mmtok + dart"]
    assert compositions(ranked, lambda spec: "no") == []


def test_twins_have_the_other_positions_and_one_budget_for_all_crops():
    ranked = [Candidate(({"name": "mmtok"},)), Candidate(({"name": "fastv"},))]
    labels = [twin.label for twin in twins(ranked, True, lambda spec: None)]
    assert labels == ["mmtok(positions=original)", "mmtok(scope=image)", "fastv(positions=compact)"] or labels == [
        "mmtok(positions=original)",
        "mmtok(scope=image)",
        "fastv(positions=original)",
    ]
    assert all("scope" not in twin.label for twin in twins(ranked, False, lambda spec: None))


def test_the_front_has_what_no_other_beats(finished):
    _, outcome = finished
    runs = outcome.found.runs
    kept = front(runs)
    for run_ in runs:
        beaten = any(
            other.sample.tokens <= run_.sample.tokens and other.sample.retention > run_.sample.retention
            for other in runs
        )
        assert not (beaten and run_ in kept)
    assert max(run_.sample.retention for run_ in kept) == max(run_.sample.retention for run_ in runs)


def test_the_tuned_file_prunes(finished, model):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vtprune.eval.inputs import chat_inputs

    output, outcome = finished
    loaded, processor = AutoModelForImageTextToText.from_pretrained(model), AutoProcessor.from_pretrained(model)
    example = tiny_eval.examples(1)[0]
    inputs = chat_inputs(processor, [example.image], [example.question])
    with torch.inference_mode(), vtprune.prune(loaded, str(output / "tuned.yaml")) as session:
        loaded(**inputs)
    share = session.report.prefill_flops / session.report.unpruned_prefill_flops
    assert share == pytest.approx(outcome.found.choice.sample.costs["flops"], abs=0.05)
    assert json.dumps(session.report.to_dict())
