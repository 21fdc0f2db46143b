# SPDX-License-Identifier: Apache-2.0
"""`python -m lmms_eval --model vtprune` as a user runs it, offline, beside `vtprune eval` on the same tasks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from vtprune.errors import ConfigError
from vtprune.eval import digitscenes
from vtprune.eval.config import load_config
from vtprune.eval.digitscenes.video_model import build_video_model, build_video_processor
from vtprune.eval.pages.report import write_report
from vtprune.eval.results.compare import compare, terminal_tables
from vtprune.eval.results.finished import comparisons
from vtprune.eval.results.records import cell_records
from vtprune.eval.results.statistics import mean_interval, retention_interval
from vtprune.eval.running import runner
from vtprune.eval.tasks import TASKS

TASK_FOLDER = Path(digitscenes.__file__).parent.parent / "tasks"
LIMIT = 7
PRUNED = {"digitscenes": "mmtok", "digitscenes_video": "divprune"}
RATIO = 0.25
RUNS = [("digitscenes", method, batch) for method in (None, "mmtok") for batch in (1, 4)]
RUNS += [("digitscenes_video", None, 1), ("digitscenes_video", "divprune", 4)]

# A task of log-likelihoods about the scenes: which of three words is the answer to a question about a colour?
CHOICES = f"""
include: {TASK_FOLDER}/digitscenes.yaml
task: choices
output_type: multiple_choice
generation_kwargs: null
process_results: null
doc_to_target: !function choices.target
doc_to_choice: !function choices.choices
target_delimiter: ""
metric_list:
  - metric: acc
"""
CHOICES_PY = """
def choices(doc):
    wrong = [word for word in ("red", "yes", "7") if word != doc["answer"]]
    return [*wrong[:1], doc["answer"], *wrong[1:]]

def target(doc):
    return 1
"""


def lmms_eval(home: Path, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess:
    """The command in a process of its own, or in one a rank."""
    offline = {f"{name}_OFFLINE": "1" for name in ("HF_HUB", "HF_DATASETS", "TRANSFORMERS", "HF_EVALUATE")}
    env = os.environ | offline | {"HF_HOME": str(home), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *launcher, "lmms_eval", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


def samples(output: Path, task: str) -> list[dict]:
    """What was logged, in the order of the documents."""
    (path,) = output.glob(f"*/*_samples_{task}.jsonl")
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def results(output: Path) -> dict:
    (path,) = output.glob("*/*_results.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The trained model for scenes, an untrained one for clips."""
    folder = tmp_path_factory.mktemp("video_model")
    torch.manual_seed(0)
    build_video_model().save_pretrained(folder)
    build_video_processor().save_pretrained(folder)
    return {"digitscenes": str(digitscenes.MODEL_PATH), "digitscenes_video": str(folder)}


@pytest.fixture(scope="module")
def lmms_runs(home, models, tmp_path_factory):
    """All runs of this file that succeed, by one command: (task, method, batch size) -> output folder."""
    folder = tmp_path_factory.mktemp("lmms")
    (folder / "choices.yaml").write_text(CHOICES)
    (folder / "choices.py").write_text(CHOICES_PY)
    wanted = [*RUNS, ("choices", "mmtok", 4)]
    runs, outputs = [], {}
    for task, method, batch in wanted:
        outputs[task, method, batch] = output = folder / f"{task}-{method}-{batch}"
        (folder / "method.yaml").write_text(f"name: {PRUNED['digitscenes']}\nkeep_ratio: {RATIO}\n")
        model = models["digitscenes" if task == "choices" else task]
        pruning = "" if method is None else f",method={method},keep_ratio={RATIO}"
        if (task, batch) == ("digitscenes", 1) and method is not None:
            pruning = f",method=@{folder}/method.yaml"
        runs.append(
            {
                "model": "vtprune",
                "model_args": f"pretrained={model}{pruning}",
                "device": "cpu",
                "tasks": task,
                "include_path": [str(TASK_FOLDER), str(folder)],
                "force_simple": task == "choices",
                "batch_size": str(batch),
                "limit": LIMIT,
                "log_samples": True,
                "output_path": str(output),
            }
        )
    (folder / "runs").mkdir()
    (folder / "runs" / "all.yml").write_text(yaml.safe_dump(runs))
    done = lmms_eval(home, "--config", folder / "runs" / "all.yml")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return outputs


@pytest.fixture(scope="module")
def vtprune_runs(models, tmp_path_factory):
    """`vtprune eval` on both tasks, with the batch size 4: (task, method) -> records."""
    folder, records = tmp_path_factory.mktemp("vtprune"), {}
    for task, model in models.items():
        config = {"model": model, "task": task, "limit": LIMIT, "batch_size": 4, "keep_ratios": [RATIO]}
        config |= {"baselines": ["full"], "methods": [PRUNED[task]]}
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(config))
        settings = load_config(folder / f"{task}.yaml", output=folder / task)
        for line in runner.run(settings):
            method = None if line["method"] == "full" else line["method"]
            records[task, method] = cell_records(settings.output, line["cell"])
    return records


@pytest.mark.parametrize(("task", "method", "batch"), RUNS)
def test_both_commands_agree_on_every_sample(lmms_runs, vtprune_runs, task, method, batch):
    logged = samples(lmms_runs[task, method, batch], task)
    records = vtprune_runs[task, method]
    assert [sample["doc_id"] for sample in logged] == [record["index"] for record in records] == list(range(LIMIT))
    for sample, record in zip(logged, records, strict=True):
        assert sample["filtered_resps"] == record["prediction"]
        assert sample["accuracy"] == record["score"]
        assert (sample["input"], sample["target"]) == (record["question"], record["answer"])
        (counts,) = sample["token_counts"]
        exact = ["final_tokens", "average_tokens", "kept", "prefill_flops", "kv_bytes"]
        assert {key: counts[key] for key in exact} == {key: record[key] for key in exact}
        assert (counts["final_tokens"] < counts["visual_tokens"]) == (method is not None)


@pytest.mark.parametrize("task", PRUNED)
def test_results_hold_the_score_and_the_cost(lmms_runs, vtprune_runs, task):
    summary = results(lmms_runs[task, PRUNED[task], 4])
    records = vtprune_runs[task, PRUNED[task]]
    assert summary["results"][task]["accuracy,none"] == pytest.approx(sum(r["score"] for r in records) / LIMIT)
    cost = summary["throughput"]
    for key in ("final_tokens", "average_tokens", "prefill_flops", "kv_bytes"):
        assert cost[f"avg_{key}"] == pytest.approx(sum(r[key] for r in records) / LIMIT)
    assert cost["avg_keep_ratio"] == pytest.approx(RATIO, abs=0.02)
    unpruned = results(lmms_runs[task, None, 1])["throughput"]
    assert unpruned["avg_keep_ratio"] == 1.0 and unpruned["avg_prefill_flops"] > cost["avg_prefill_flops"]


def test_log_likelihoods(lmms_runs, vtprune_runs):
    """The answer is the likeliest of three words just when the model gives it, and greedy just then."""
    logged = samples(lmms_runs["choices", "mmtok", 4], "choices")
    right = [record["score"] for record in vtprune_runs["digitscenes", "mmtok"]]
    assert sum(right) > LIMIT / 2
    for sample, given in zip(logged, right, strict=True):
        scored = [(float(loss), greedy == "True") for loss, greedy in sample["filtered_resps"]]  # logged as strings
        losses, greedy = zip(*scored, strict=True)
        assert greedy[1] == bool(given) and sum(greedy) <= 1
        assert sample["acc"] == (losses[1] == min(losses)) >= given
        assert sample["token_counts"][0]["final_tokens"] == 36


def test_folders_of_runs_are_rows_of_one_comparison(lmms_runs, vtprune_runs, tmp_path):
    folders = [lmms_runs["digitscenes", method, 4] for method in ("mmtok", None)]
    (comparison,) = comparisons(folders)
    assert [line["label"] for line in comparison.lines] == ["full", "mmtok"]  # the full model first
    assert [line["keep_ratio"] for line in comparison.lines] == [1.0, RATIO]
    for line, method in zip(comparison.lines, (None, "mmtok"), strict=True):
        records = vtprune_runs["digitscenes", method]
        scores = [record["score"] for record in records]
        assert line["score"] == line["metrics"]["accuracy"] == pytest.approx(mean_interval(scores)[0])
        assert line["ci"] == mean_interval(scores)[1]
        answers = comparison.answers[line["cell"]]
        assert answers.scores.tolist() == scores
        assert answers.predictions == [record["prediction"] for record in records]
        assert line["average_tokens"] == sum(record["average_tokens"] for record in records) / LIMIT
        full = [record["score"] for record in vtprune_runs["digitscenes", None]]
        assert (line["retention"], line["retention_ci"]) == retention_interval(scores, full)
    assert comparison.lines[1]["measured_keep_ratio"] == pytest.approx(RATIO, abs=0.02)
    write_report(folders, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<section id=") == 1 and "mmtok" in page
    with pytest.raises(ConfigError, match="digitscenes has no run of the full model.*once without a method"):
        comparisons(folders[:1])


def test_two_folders_of_runs_are_compared(lmms_runs, vtprune_runs, tmp_path):
    compared = compare(lmms_runs["digitscenes", None, 4], lmms_runs["digitscenes", "mmtok", 4])
    (pair,) = compared.pairs
    assert (pair.first.label, pair.second.label, compared.only) == ("full", "mmtok", ([], []))
    gaps = [
        ours["score"] - theirs["score"]
        for ours, theirs in zip(*(vtprune_runs["digitscenes", method] for method in ("mmtok", None)), strict=True)
    ]
    assert pair.difference.mean == pytest.approx(sum(gaps) / LIMIT)
    (table,) = terminal_tables(compared)
    assert list(table.columns[0].cells) == ["full, then mmtok"] and list(table.columns[1].cells) == ["100 %, 25 %"]
    (again,) = compare(*[lmms_runs["choices", "mmtok", 4]] * 2).pairs  # log-likelihoods, without the full model
    assert again.verdict == "same" and again.first.label == "mmtok"
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="no results.jsonl here"):
        compare(tmp_path / "other", tmp_path / "other")


def test_a_failing_run_does_not_exit_with_0(home, tmp_path):
    """lmms-eval catches exceptions and exits with 0; scenes are no clips."""
    model = f"pretrained={digitscenes.MODEL_PATH}"
    where = ["--include_path", TASK_FOLDER, "--output_path", tmp_path / "out", "--limit", 2]
    done = lmms_eval(home, "--model", "vtprune", "--model_args", model, "--tasks", "digitscenes_video", *where)
    assert done.returncode == 2
    assert "error: the task shows videos, which LlavaProcessor does not take" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ("process_results: !function broken.no_metric", "ZeroDivisionError"),
        ("dataset_path: no/such/data\ndataset_kwargs: null", "no/such/data"),
    ],
    ids=["metric", "data"],
)
@pytest.mark.slow
def test_what_fails_in_lmms_eval_does_not_exit_with_0_either(home, tmp_path, broken, problem):
    (tmp_path / "broken.yaml").write_text(f"include: {TASK_FOLDER}/digitscenes.yaml\ntask: broken\n{broken}\n")
    (tmp_path / "broken.py").write_text("def no_metric(doc, results):\n    return 1 / 0\n")
    model = ["--model", "vtprune", "--model_args", f"pretrained={digitscenes.MODEL_PATH}"]
    where = ["--include_path", tmp_path, "--output_path", tmp_path / "out", "--limit", 1]
    done = lmms_eval(home, *model, "--tasks", "broken", *where)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert problem in done.stderr and "Error during evaluation" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes(home, lmms_runs, tmp_path):
    """Each answers half of the documents; an odd one makes lmms-eval invent a request, which is not run."""
    model = f"pretrained={digitscenes.MODEL_PATH},method=mmtok,keep_ratio={RATIO}"
    command = ["--model", "vtprune", "--model_args", model, "--include_path", TASK_FOLDER, "--limit", LIMIT]
    command += ["--batch_size", 4, "--log_samples", "--output_path", tmp_path / "out"]
    done = lmms_eval(home, *command, "--tasks", "digitscenes", ranks=2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    alone = samples(lmms_runs["digitscenes", "mmtok", 4], "digitscenes")
    for sample, expected in zip(samples(tmp_path / "out", "digitscenes"), alone, strict=True):
        assert sample["filtered_resps"] == expected["filtered_resps"]
        assert sample["token_counts"][0]["kept"] == expected["token_counts"][0]["kept"]
    assert results(tmp_path / "out")["throughput"]["avg_latency"] > 0
    assert lmms_eval(home, *command, "--tasks", "digitscenes_video", ranks=2).returncode != 0


def test_the_tasks_are_those_of_vtprune_eval(home, monkeypatch):
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(home / "datasets"))
    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False, model_name="vtprune")
    assert set(manager.all_tasks) == set(PRUNED)
    for name, shown in manager.load_task_or_group(list(PRUNED), task_type="chat").items():
        task = TASKS[name]()
        assert shown.config.generation_kwargs == {
            "max_new_tokens": task.max_new_tokens,
            "do_sample": False,
            "until": [],
        }
        documents = shown.test_docs()
        assert len(documents) == {"image": digitscenes.SIZE, "video": digitscenes.VIDEO_SIZE}[task.kind]
        for index, example in enumerate(task.examples(3)):
            document = documents[index]
            ((turn,),) = [shown.doc_to_messages(document)]
            medium, text = turn["content"]
            assert medium["type"] == task.kind and text["text"] == example.question
            expected = example.image if task.kind == "image" else str(example.video_path())
            assert medium["url"] == expected
            assert shown.doc_to_target(document) == example.answer and document["family"] == example.family
            assert shown.process_results(document, [f" {example.answer}. "]) == {"accuracy": 1.0}
