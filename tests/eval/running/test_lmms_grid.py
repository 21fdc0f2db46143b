# SPDX-License-Identifier: Apache-2.0
"""Tasks of lmms-eval in an evaluation file, against lmms-eval's own run of the model `vtprune` on the same tasks."""

import argparse
import io
import shutil
import subprocess
import sys

import local_lmms
import pytest
import tiny_eval
import torch
import yaml
from lmms_eval.evaluator import simple_evaluate
from rich.console import Console

from vtprune.errors import ConfigError
from vtprune.eval.config import load_config
from vtprune.eval.digitscenes.video_model import build_video_model, build_video_processor
from vtprune.eval.lmms.model import VTPruneChat, VTPruneSimple
from vtprune.eval.pages.report import write_report
from vtprune.eval.results.entries import studies
from vtprune.eval.results.records import cell_records
from vtprune.eval.results.terminal import terminal_table
from vtprune.eval.results.timings import latencies
from vtprune.eval.running.lmms import LmmsEvaluator
from vtprune.eval.running.runner import run
from vtprune.eval.tasks import lmms_tasks

LIMIT = 6
RATIO = 0.25
PUBLISHED = tuple(f"{name}_here" for name in local_lmms.PUBLISHED)
CHAT = ("pairs", "first_word", "two_images", *PUBLISHED)
SIMPLE = ("choices", "greedy")
GRID = {"limit": LIMIT, "batch_size": 4, "keep_ratios": [RATIO], "baselines": ["full"]}


@pytest.fixture(scope="module")
def folder(lmms_folder):
    return lmms_folder


@pytest.fixture(scope="module")
def video_model(folder):
    torch.manual_seed(0)
    build_video_model().save_pretrained(folder / "video")
    build_video_processor().save_pretrained(folder / "video")
    return str(folder / "video")


def evaluate(folder, name, **settings):
    """A run of `vtprune eval`: its settings and its lines."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(GRID | settings))
    config = load_config(path, output=folder / name)
    return config, run(config)


@pytest.fixture(scope="module")
def grid(folder):
    task = ["lmms:both", *(f"lmms:{name}" for name in (*CHAT[1:], "greedy"))]
    return evaluate(folder, "grid", model="digitscenes", task=task, include_path="tasks", methods=["mmtok"])


@pytest.fixture(scope="module")
def clips(folder, video_model):
    include = str(local_lmms.SCENES.parent)
    task = "lmms:digitscenes_video"
    return evaluate(folder, "clips", model=video_model, task=task, include_path=include, methods=["divprune"])


def theirs(model_class, tasks, include, folder, **arguments):
    """What lmms-eval itself says of the tasks: task -> metric -> value, and task -> samples."""
    found = simple_evaluate(
        model=model_class(batch_size=4, device="cpu", dtype="float32", **arguments),
        tasks=list(tasks),
        task_manager=lmms_tasks._manager((str(include),)),  # takes seconds to make
        limit=LIMIT,
        bootstrap_iters=0,
        cli_args=argparse.Namespace(output_path=str(folder / "out"), process_with_media=False, reasoning_tags=None),
    )
    values = {
        task: {key.removesuffix(",none"): value for key, value in own.items() if "_stderr" not in key}
        for task, own in found["results"].items()
    }
    return values, found["samples"]


@pytest.mark.parametrize(("adapter", "tasks"), [(VTPruneChat, CHAT), (VTPruneSimple, SIMPLE)])
@pytest.mark.parametrize("method", ["full", "mmtok"])
def test_every_metric_is_that_of_lmms_eval(folder, grid, adapter, tasks, method):
    config, lines = grid
    pruned = {} if method == "full" else {"method": method, "keep_ratio": RATIO}
    values, samples = theirs(adapter, tasks, folder / "tasks", folder, pretrained="digitscenes", **pruned)
    for task in tasks:
        (line,) = [line for line in lines if (line["task"], line["method"]) == (task, method)]
        assert line["metrics"] and line["score"] == line["metrics"][line["metric"]]
        for metric, value in line["metrics"].items():
            assert value == pytest.approx(values[task][metric], abs=1e-4), (task, metric)
        for sample, record in zip(samples[task], cell_records(config.output, line["cell"]), strict=False):
            assert sample["doc_id"] == record["index"]
            counts = sample["token_counts"][0]
            assert {key: counts[key] for key in ("average_tokens", "prefill_flops", "kept")} == {
                key: record[key] for key in ("average_tokens", "prefill_flops", "kept")
            }
            if task in CHAT:
                assert record["prediction"] == sample["filtered_resps"][0]


def test_videos_are_scored_alike(folder, clips, video_model):
    config, lines = clips
    include = local_lmms.SCENES.parent
    for line in lines:
        pruned = {} if line["method"] == "full" else {"method": "divprune", "keep_ratio": RATIO}
        values, samples = theirs(VTPruneChat, ["digitscenes_video"], include, folder, pretrained=video_model, **pruned)
        assert line["metrics"] == {"accuracy": values["digitscenes_video"]["accuracy"]}
        said = [record["prediction"] for record in cell_records(config.output, line["cell"])]
        assert said == [sample["filtered_resps"][0] for sample in samples["digitscenes_video"]]


def test_a_processor_that_reads_every_frame_is_refused(folder, video_model):
    processor = build_video_processor()
    processor.video_processor.do_sample_frames = False
    shutil.copytree(video_model, folder / "every_frame")
    processor.save_pretrained(folder / "every_frame")
    include = str(local_lmms.SCENES.parent)
    with pytest.raises(ConfigError, match="lmms:digitscenes_video: the processor of .* takes every frame of a video"):
        evaluate(
            folder, "frames", model=str(folder / "every_frame"), task="lmms:digitscenes_video", include_path=include
        )


def test_published_metrics_come_from_their_own_aggregation(grid):
    _, lines = grid
    full = {line["task"]: line for line in lines if line["label"] == "full"}
    pope, mme, gqa = (full[name] for name in PUBLISHED)
    assert list(pope["metrics"])[:2] == ["pope_accuracy", "pope_precision"] and "pope_f1_score" in pope["metrics"]
    assert list(mme["metrics"]) == ["mme_perception_score", "mme_cognition_score"]
    assert gqa["metric"] == "exact_match" and set(gqa["family_scores"]) == {"existence", "code_reasoning"}


def test_a_group_becomes_its_tasks_and_scores_keep_their_unit(grid):
    _, lines = grid
    assert list(dict.fromkeys(line["task"] for line in lines)) == ["pairs", "choices", *CHAT[1:], "greedy"]
    units = {line["task"]: (line["metric"], line["score_unit"]) for line in lines}
    assert units["pairs"] == ("odd_points", "points") and units["choices"] == ("acc", "share")
    assert units["first_word"] == ("harmonic,letter", "share")
    pairs = {line["label"]: line for line in lines if line["task"] == "pairs"}
    assert set(pairs["full"]["metrics"]) == {"odd_points", "pair_points"}  # no file for a server
    assert pairs["mmtok"]["retention"] == pairs["mmtok"]["score"] / pairs["full"]["score"]


def test_a_second_start_computes_nothing_and_changed_tasks_everything(folder, grid, monkeypatch):
    config, lines = grid
    ran = []
    run_batch = LmmsEvaluator._run_batch

    def counted(self, batch, *arguments):
        ran.append((self.task.name, len(batch)))
        return run_batch(self, batch, *arguments)

    monkeypatch.setattr(LmmsEvaluator, "_run_batch", counted)
    assert run(config) == lines and not ran
    code = folder / "tasks" / "local.py"
    before = code.read_text()
    try:
        code.write_text(before.replace("50 * sum(scores)", "25 * sum(scores)"))
        lmms_tasks._manager.cache_clear()
        smaller = load_config(folder / "grid.yaml", {"task": "lmms:pairs"}, output=config.output)
        changed = run(smaller)
    finally:
        code.write_text(before)
        lmms_tasks._manager.cache_clear()
    assert sum(count for _, count in ran) == LIMIT * len(changed)
    assert changed[0]["score"] == 0.75 * lines[0]["score"] == 150.0
    assert run(config) == lines


def printed(table):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_tables_and_page_show_points_as_they_are(grid):
    config, lines = grid
    summary = (config.output / "summary.md").read_text()
    assert "## odd_points in points" in summary and "| full | 200.0 [200.0, 200.0] |" in summary
    assert "## harmonic,letter in %" in summary
    times = latencies([config.output])
    shown = {study[0]["task"]: printed(terminal_table(study, times)) for study in studies(lines).values()}
    assert "score: odd_points in points;" in shown["pairs"] and "accuracy" not in shown["pairs"]
    assert " 200.0 " in next(line for line in shown["pairs"].splitlines() if line.startswith("full"))
    assert "score: harmonic,letter in %;" in shown["first_word"]
    write_report([config.output], config.output / "report.html")
    page = (config.output / "report.html").read_text()
    assert "has odd_points of 200.0 points" in page and "has harmonic,letter of 90.9 %" in page
    assert page.count("<section id=") == 8 and "cannot be loaded here" not in page


METHODS = ["mmtok", {"name": "random", "seeds": [0]}, "uniform", "pool"]
KILLED = {"limit": 4, "batch_size": 2, "keep_ratios": [0.5, 0.25], "methods": METHODS}
CELLS = 3 * (2 + 5 * 2)


@pytest.mark.slow
def test_three_tasks_that_are_killed_three_times_end_with_every_cell_once(folder, tmp_path):
    path = tmp_path / "grid.yaml"
    task = ["lmms:pairs", "lmms:choices", "lmms:two_images"]
    settings = {"model": "digitscenes", "task": task, "include_path": str(folder / "tasks"), **KILLED}
    path.write_text(yaml.safe_dump(settings))
    output = tmp_path / "output"
    command = [sys.executable, "-m", "vtprune", "eval", str(path), "--output", str(output)]
    lines = tiny_eval.run_killed_three_times(command, output, CELLS, KILLED["limit"])
    write_report([output], output / "report.html")
    assert (output / "report.html").read_text().count("<section id=") == 3
    assert {line["task"] for line in lines} == {"pairs", "choices", "two_images"}


@pytest.mark.slow
def test_two_processes_leave_the_files_of_one(folder, tmp_path):
    path = tmp_path / "grid.yaml"
    settings = {"model": "digitscenes", "task": ["lmms:pairs", "lmms:choices"], "include_path": str(folder / "tasks")}
    path.write_text(yaml.safe_dump(GRID | settings | {"batch_size": 2, "methods": ["mmtok"]}))
    run(load_config(path, output=tmp_path / "one"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command = [*launcher, "vtprune", "eval", str(path), "--output", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert tiny_eval.files(tmp_path / "two") == tiny_eval.files(tmp_path / "one")
