# SPDX-License-Identifier: Apache-2.0
"""Evaluation of own data: several pictures, videos, changed data, and the commands around it."""

import json
import signal
import subprocess
import sys
import time

import pytest
import tiny_eval
import tiny_video
import yaml
from PIL import Image
from typer.testing import CliRunner

from vtprune.cli import app
from vtprune.errors import ConfigError
from vtprune.eval import digitscenes
from vtprune.eval.config import EvalConfig, load_config
from vtprune.eval.pages.report import SHOWN, write_report
from vtprune.eval.pages.views import read_views, views_folder
from vtprune.eval.results.compare import compare
from vtprune.eval.results.records import cell_records, read_results
from vtprune.eval.running.runner import run

GRID = {"keep_ratios": [0.5], "batch_size": 2, "max_new_tokens": 3, "methods": ["uniform"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_eval.save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def folder(model, tmp_path):
    """An evaluation file with own data beside it: four pictures with two questions each."""
    drawn = tiny_eval.examples(4)
    for index, example in enumerate(drawn):
        example.image.save(tmp_path / f"{index}.png")
    rows = [{"image": f"{i}.png", "question": f"word{w} word1", "answer": "word2"} for i in range(4) for w in (3, 4)]
    write_rows(tmp_path, rows)
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"model": model, "task": {"file": "mine.jsonl"}, **GRID}))
    return tmp_path


def write_rows(folder, rows):
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "mine.jsonl").read_text().splitlines()]


def ran(folder, output="out", **changes):
    """The lines of a run, and how many examples were computed for it."""
    log = folder / output / "timings.jsonl"
    before = len(log.read_bytes().splitlines()) if log.exists() else 0
    lines = run(load_config(folder / "grid.yaml", changes, output=folder / output))
    batches = [json.loads(line) for line in log.read_bytes().splitlines()][before:]
    return lines, sum(batch["examples"] for batch in batches)


def test_changed_data_are_computed_anew(folder):
    lines, computed = ran(folder)
    assert computed == 4 * 8 and {(line["task"], line["n"], line["status"]) for line in lines} == {("mine", 8, "ok")}
    assert ran(folder) == (lines, 0)

    rows = rows_of(folder)
    said = cell_records(folder / "out", lines[0]["cell"])[0]["prediction"] or "nothing"
    write_rows(folder, [rows[0] | {"answer": said}, *rows[1:]])
    other, computed = ran(folder)
    assert computed == 4 * 8 and not {line["cell"] for line in lines} & {line["cell"] for line in other}
    assert other[0]["score"] != lines[0]["score"]

    write_rows(folder, rows)
    assert ran(folder) == (lines, 0)  # the cells of these data are still there

    Image.new("RGB", (56, 56), "red").save(folder / "3.png")
    assert ran(folder)[1] == 4 * 8
    assert ran(folder, **{"task.score": "contains"})[1] == 4 * 8


def test_only_the_examples_that_run_count(folder):
    lines, computed = ran(folder, limit=4)
    assert computed == 4 * 4
    Image.new("RGB", (56, 56), "red").save(folder / "3.png")
    assert ran(folder, limit=4) == (lines, 0)


def test_pictures_of_other_data_are_not_shown(folder):
    first, _ = ran(folder, "first")
    original = (folder / "0.png").read_bytes()
    views = views_folder(folder / "first", "mine", first[0]["weights"])
    assert list(read_views(views)) == list(range(8))
    Image.new("RGB", (56, 56), "red").save(folder / "0.png")
    ran(folder, "first")  # its views are of the red picture
    (folder / "0.png").write_bytes(original)
    lines, computed = ran(folder, "first")
    assert (lines, computed) == (first, 0)
    write_report([folder / "first"], folder / "page.html")
    page = (folder / "page.html").read_text()
    assert "what the encoder saw of example 2" in page
    assert "what the encoder saw of example 0" not in page and "what the encoder saw of example 1" not in page


def test_other_pictures_are_not_compared(folder):
    ran(folder, "first")
    Image.new("RGB", (56, 56), "red").save(folder / "1.png")
    ran(folder, "second")
    assert compare(folder / "first", folder / "first").pairs
    with pytest.raises(ConfigError, match="example 2, 'word3 word1', has other pictures or settings in"):
        compare(folder / "first", folder / "second")


def test_several_pictures_in_a_prompt(folder):
    """Every one of them has its tokens, is made smaller, and is drawn."""
    pairs = [{"images": ["0.png", f"{i}.png"], "question": "word3", "answer": "word2"} for i in (1, 2, 3)]
    write_rows(folder, [*pairs, {"images": ["2.png"], "question": "word3", "answer": "word2"}])
    lines, _ = ran(folder)
    tokens = {line["method"]: line["final_tokens"] for line in lines}
    assert tokens == {"full": (3 * 32 + 16) / 4, "zero": 0, "downsample": (3 * 18 + 9) / 4, "uniform": (3 * 16 + 8) / 4}
    views = read_views(views_folder(folder / "out", "mine", lines[0]["weights"]))
    assert [view.grids for view, _ in views.values()] == [[[4, 4], [4, 4]]] * 3 + [[[4, 4]]]
    assert views[0][0].places[15:17] == [[0, 3, 3], [1, 0, 0]]
    kept = cell_records(folder / "out", lines[3]["cell"])[0]["kept"]
    assert len(kept) == 16 and min(kept) < 16 <= max(kept)


def test_a_picture_answers_the_same_alone_and_with_its_task(folder):
    """Rows are the prompts that a Python task with the same examples has."""
    drawn = tiny_eval.examples(4)
    rows = [{"image": f"{i}.png", "question": e.question, "answer": e.answer} for i, e in enumerate(drawn)]
    write_rows(folder, rows)
    own, _ = ran(folder)
    python = run(load_config(folder / "grid.yaml", {"task": "tiny", "limit": 4}, output=folder / "python"))
    for one, other in zip(own, python, strict=True):
        said = [
            [r["prediction"] for r in cell_records(folder / out, line["cell"])]
            for out, line in (("out", one), ("python", other))
        ]
        assert said[0] == said[1] and one["prefill_flops"] == other["prefill_flops"]


def test_videos(tmp_path):
    for index in range(3):
        tiny_video.write_clip(tmp_path / f"{index}.mp4", tiny_video.clip(index))
    write_rows(tmp_path, [{"video": f"{i}.mp4", "question": "word1", "answer": "word2"} for i in range(3)])
    grid = {"model": str(tiny_video.save_model(tmp_path / "model")), "task": {"file": "mine.jsonl"}, **GRID}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    lines, _ = ran(tmp_path)
    tokens = {line["method"]: line["final_tokens"] for line in lines}
    assert tokens["full"] == tiny_video.TOKENS and tokens["downsample"] == 3 * 16 + 1 and tokens["zero"] == 0
    write_report([tmp_path / "out"], tmp_path / "page.html")
    assert "<image" in (tmp_path / "page.html").read_text()


def test_paths_are_relative_to_where_they_are_written(folder, monkeypatch):
    (task,) = load_config(folder / "grid.yaml").task
    assert (task.file, task.media, task.title) == (folder / "mine.jsonl", None, "mine")
    monkeypatch.chdir(folder.parent)
    changes = {"task.file": "own/mine.csv", "task.media": "pictures", "task.name": "ours"}
    (task,) = load_config(folder / "grid.yaml", changes).task
    assert (str(task.file), str(task.media), task.title) == ("own/mine.csv", "pictures", "ours")
    (task,) = load_config("quickstart", {"task.file": "mine.csv", "task.score": "anls"}).task
    assert (str(task.file), task.score) == ("mine.csv", "anls")
    listed = load_config(folder / "grid.yaml", {"task": ["digitscenes", "tiny"], "task.1.file": "x.csv"}).task
    assert listed[0] == "digitscenes" and str(listed[1].file) == "x.csv"
    (task,) = EvalConfig(model="digitscenes", task={"file": "a.csv"}, output="o", keep_ratios=(0.5,)).task
    assert str(task.file) == "a.csv"


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"file": "a.csv", "scor": "anls"}, "key 'task.scor': unknown key; did you mean score?"),
        ({"file": "a.csv", "score": "fuzzy"}, "key 'task.score': expected 'exact', 'contains', 'choice'"),
        ({"media": "a"}, "key 'task.file': missing"),
        ([{"file": "a.csv"}, {"file": "b/a.csv"}], "key 'task': expected each name once"),
        (["digitscenes", {"file": "a.csv", "prompt": "x"}], "key 'task.1.prompt': expected {question} in it"),
        ([], "key 'task'"),
        (3, "key 'task'"),
    ],
)
def test_what_is_wrong_in_an_evaluation_file(folder, task, said):
    (folder / "grid.yaml").write_text(yaml.safe_dump({"model": "digitscenes", "task": task, **GRID}))
    with pytest.raises(ConfigError) as caught:
        load_config(folder / "grid.yaml")
    assert f"{folder / 'grid.yaml'}, line" in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_mistakes_in_data_are_told_before_a_model_is_loaded(folder, options):
    write_rows(folder, [*rows_of(folder), {"image": "gone.png", "question": "?", "answer": "x"}])
    (folder / "empty").mkdir()
    command = ["eval", str(folder / "grid.yaml"), "--output", str(folder / "out"), *options]
    result = CliRunner().invoke(app, [*command, "--set", f"limit={8}"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, [*command, "--output", str(folder / "other")])
    assert result.exit_code == 2 and "line 9: image 'gone.png': no such file" in " ".join(result.stderr.split())
    assert not list((folder / "other").glob("cells/*"))


def test_the_dry_run_of_own_data(folder):
    result = CliRunner().invoke(app, ["eval", str(folder / "grid.yaml"), "--dry-run"])
    # The name of a folder may be wrapped in the title.
    title = "".join(result.stdout.partition("┏")[0].split())
    assert result.exit_code == 0 and title.startswith("mine,") and title.endswith(":4cells")
    assert [line.split()[1] for line in result.stdout.splitlines() if "%" in line] == [
        "full",
        "zero",
        "downsample",
        "uniform",
    ]


@pytest.mark.slow
def test_two_hundred_pictures_end_to_end(tmp_path):
    """Methods by ratios on the model that comes with the library; the run is killed, and then the data change."""
    (tmp_path / "pictures").mkdir()
    rows = []
    for example in digitscenes.examples("test", limit=200):
        example.image.save(tmp_path / "pictures" / f"{example.index}.png")
        texts = {key: getattr(example, key) for key in ("question", "answer", "family")}
        rows.append({"image": f"{example.index}.png", **texts})
    write_rows(tmp_path, rows)
    methods = ["divprune", "mmtok", "uniform", {"name": "random", "seeds": [0]}]
    grid = {"model": "digitscenes", "keep_ratios": [0.5, 0.25, 0.11], "baselines": ["full", "zero"], "methods": methods}
    task = {"file": "mine.jsonl", "media": "pictures"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"task": task, **grid}))
    output = tmp_path / "out"
    command = [sys.executable, "-m", "vtprune", "eval", str(tmp_path / "mine.yaml"), "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while tiny_eval.examples_on_disk(output) < 500 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = tiny_eval.examples_on_disk(output)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "mine, digitscenes, 200 examples" in done.stdout, done.stderr

    lines = read_results(output / "results.jsonl")
    assert len(lines) == 2 + 4 * 3 and {line["n"] for line in lines} == {200}
    logged = [json.loads(line)["examples"] for line in (output / "timings.jsonl").read_bytes().splitlines()]
    assert 500 <= before < 200 * len(lines) <= sum(logged) <= 200 * len(lines) + 16  # a batch at most ran twice
    python = {"task": "digitscenes", "limit": 200, "baselines": ["full"], "methods": ["divprune"]}
    same = run(load_config(tmp_path / "mine.yaml", python, output=tmp_path / "python"))
    scores = {(line["method"], line["keep_ratio"]): line["score"] for line in lines}
    assert all(scores[line["method"], line["keep_ratio"]] == line["score"] for line in same)
    assert scores["full", 1.0] > 0.85 > 0.4 > scores["zero", 0.0]

    write_report([output], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("what the encoder saw of example") == SHOWN and "Without pictures" not in page

    write_rows(tmp_path, [row | {"answer": "wrong"} for row in rows])
    done = subprocess.run([*command, "--set", "methods=[]"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line["score"] for line in read_results(output / "results.jsonl")] == [0.0, 0.0]
