# SPDX-License-Identifier: Apache-2.0
"""The runner with a CLIP that classifies: its numbers by hand, what it resumes and refuses, the words of its pages."""

import re
from statistics import mean

import pytest
import tiny_eval
import torch
import yaml
from tiny_clip import transformers_model
from transformers import CLIPImageProcessor, CLIPProcessor, SiglipProcessor
from typer.testing import CliRunner

import vtprune
from vtprune.adaptation import AdaptingClassifier
from vtprune.classify import ZeroShotClassifier
from vtprune.cli import app
from vtprune.errors import ConfigError
from vtprune.eval import digitscenes
from vtprune.eval.config import load_config
from vtprune.eval.digitscenes.open_clip_model import build_open_clip_tokenizer
from vtprune.eval.inputs import classifiers
from vtprune.eval.results.records import cell_records
from vtprune.eval.results.timings import examples_per_second, seconds_per_example
from vtprune.eval.running import evaluator
from vtprune.eval.running.cells import Identity, expand
from vtprune.eval.running.runner import run
from vtprune.eval.tasks import open_task, open_tasks

TASK = "digitscenes_digits"
CONFIG = {
    "model": "digitscenes_clip",
    "task": [TASK, "digitscenes_digits_noise"],
    "limit": 8,
    "batch_size": 5,
    "keep_ratios": [0.5, 0.05],
    "baselines": ["full"],
    "methods": [
        "tome",
        "mctf",
        {"name": "random_patches", "seeds": [0, 1]},
        "divprune",
        {"name": "tca", "reservoir": 2, "beta": 1.0, "strength": 9.0, "keep_ratios": [0.5]},
    ],
}
BATCHES = [range(0, 5), range(5, 8)]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    return output, run(load_config(config_file, output=output))


def cell(results, method, ratio, seed=None, task=TASK):
    (found,) = (
        r for r in results if (r["task"], r["method"], r["keep_ratio"], r["seed"]) == (task, method, ratio, seed)
    )
    return found


@pytest.mark.parametrize(
    ("method", "ratio", "seed", "corruption"),
    [("tome", 0.5, 0, None), ("random_patches", 0.05, 1, "noise"), ("full", 1.0, None, "noise")],
)
@torch.no_grad()
def test_numbers_of_a_cell_are_those_of_a_session(finished, method, ratio, seed, corruption):
    output, results = finished
    line = cell(results, method, ratio, seed, TASK if corruption is None else f"{TASK}_{corruption}")
    model, tokenizer, preprocess = digitscenes.load_open_clip()
    classes, templates = digitscenes.CLASSES["digit"], digitscenes.TEMPLATES["digit"]
    classifier = ZeroShotClassifier(model, tokenizer, classes, templates, preprocess=preprocess)
    items = digitscenes.labelled_images(limit=8, corruption=corruption, severity=2)
    records = cell_records(output, line["cell"])
    said, flops, counts = [], [], []
    spec = {"name": "tome", "r": 0} if method == "full" else {"name": method, "keep_ratio": ratio, "seed": seed}
    with vtprune.prune(model, spec) as session:
        for batch in BATCHES:
            said += classifier.predict([items[i].image for i in batch])
            flops.append(session.report.encoder_flops / len(batch))
            counts.append(session.report.counts)
    assert [record["prediction"] for record in records] == said
    assert [record["score"] for record in records] == [float(s == i.digit) for s, i in zip(said, items, strict=True)]
    assert [(record["index"], record["answer"]) for record in records] == [(i.index, i.digit) for i in items]
    assert line["score"] == mean(s == i.digit for s, i in zip(said, items, strict=True))
    assert {record["encoder_flops"] for record in records} == set(flops) == {line["encoder_flops"]}
    assert {record["average_tokens"] for record in records} == {mean(counts[0])}
    assert line["final_tokens"] == counts[0][-1] == round(144 * ratio)
    assert line["measured_keep_ratio"] == mean(counts[0]) / 144 and line["visual_tokens"] == 144
    assert list(line["family_scores"]) == sorted({item.digit for item in items})


@torch.no_grad()
def test_a_classifier_that_adapts_sees_the_batches_in_their_order(finished):
    output, results = finished
    records = cell_records(output, cell(results, "tca", 0.5)["cell"])
    model, tokenizer, preprocess = digitscenes.load_open_clip()
    classifier = ZeroShotClassifier(model, tokenizer, digitscenes.CLASSES["digit"], digitscenes.TEMPLATES["digit"])
    adapting = AdaptingClassifier(classifier, "tca", keep_ratio=0.5, reservoir=2, beta=1.0, strength=9.0)
    items = digitscenes.labelled_images(limit=8)
    said = []
    for batch in BATCHES:
        logits = adapting(torch.stack([preprocess(items[i].image) for i in batch]))
        said += [classifier.classes[i] for i in logits.argmax(1)]
    assert [record["prediction"] for record in records] == said


def test_lines_say_what_was_counted(finished):
    output, results = finished
    full, half = cell(results, "full", 1.0), cell(results, "tome", 0.5, 0)
    assert half["encoder_flops"] < half["unpruned_encoder_flops"] == full["encoder_flops"]
    assert full["retention"] == full["measured_keep_ratio"] == 1.0
    assert not {"prefill_flops", "kv_bytes", "unpruned_prefill_flops"} & set(full)
    assert "open_clip_torch" in full["versions"]
    assert not any("kept" in record for record in cell_records(output, full["cell"]))
    under = cell(results, "mctf", 0.05)
    assert (under["status"], under["floor"], under["encoder_flops"]) == ("under its floor", 9 / 144, None)
    assert cell(results, "divprune", 0.5)["status"] == "unsupported"


@pytest.mark.parametrize("within", ["random", "tca"])
def test_a_run_that_stops_goes_on_and_ends_in_the_same_files(finished, config_file, tmp_path, monkeypatch, within):
    """Also where it stops between the batches of a classifier that adapts."""
    config = load_config(config_file, output=tmp_path)
    times = (finished[0] / "timings.jsonl").read_text().splitlines()
    log, left = evaluator.append, [1 + next(i for i, line in enumerate(times) if f'"cell": "{within}' in line)]

    def stops(path, content):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("killed")
        log(path, content)

    monkeypatch.setattr(evaluator, "append", stops)
    with pytest.raises(RuntimeError, match="killed"):
        run(config)
    assert 0 < tiny_eval.examples_on_disk(tmp_path) < 100 and not (tmp_path / "results.jsonl").exists()
    left[0] = 1000
    run(config)
    assert tiny_eval.files(tmp_path) == tiny_eval.files(finished[0])


def test_the_summary_speaks_of_patches_and_of_speed(finished):
    output, results = finished
    summary = (output / "summary.md").read_text()
    prose = summary.partition("## Provenance")[0]
    assert not re.search("prefill|LLM|language model|decoder|question|zero_|`zero`", prose)
    speeds = examples_per_second([output])
    full, half = (speeds[cell(results, *key)["cell"]] for key in (("full", 1.0), ("tome", 0.5, 0)))
    table = prose.partition("## Images in a second")[2].partition("## By class")[0]
    assert f"| tome | {half:.0f} ({half / full:.2f}) |" in table and f"| full | {full:.0f} (1.00) |" in table
    assert "*under its floor (6.2%)*" in table
    top = prose.partition("## Accuracy")[0]
    (row,) = (line.split(" | ") for line in top.splitlines() if line.startswith("| tome | 50 %"))
    assert row[2] == "72" and row[3].endswith("(0.74)")
    scores = [100 * cell(results, "tome", 0.5, 0, task)["score"] for task in CONFIG["task"]]
    assert [float(text.strip(" |")) for text in row[5:]] == pytest.approx(scores, abs=0.05)
    assert "| method | asked | patches left | encoder, one image | images/s | digitscenes_digits | " in top


def test_speed_is_the_median_over_batches_and_the_last_time_counts(tmp_path):
    batches = [("a", 0, 4, 9.0), ("a", 0, 4, 2.0), ("a", 4, 4, 1.0), ("a", 8, 2, 2.0), ("b", 0, 4, 8.0)]
    lines = [
        f'{{"cell": "{name}", "first": {first}, "examples": {examples}, "seconds": {seconds}}}\n'
        for name, first, examples, seconds in batches
    ]
    (tmp_path / "timings.jsonl").write_text("".join(lines) + '{"cell": "b", "fir')
    assert examples_per_second([tmp_path]) == {"a": 2.0, "b": 0.5}
    assert seconds_per_example([tmp_path]) == {"a": 0.5, "b": 2.0}


def test_report_and_compare_take_the_folder(finished, tmp_path):
    output, results = finished
    page = tmp_path / "page.html"
    assert CliRunner().invoke(app, ["report", str(output), "--output", str(page)]).exit_code == 0
    text = re.sub(r"<style>.*?</style>|<pre>.*?</pre>", "", page.read_text(), flags=re.DOTALL)
    for words in ("encoder FLOPs, %", "patches behind the last layer", "images/s", "By class", "against random"):
        assert words in text
    assert "No pictures are drawn" in text and "Without pictures" not in text
    assert not re.search("prefill|language model|decoder|kind of question|questions", text)
    compared = CliRunner(env={"COLUMNS": "100"}).invoke(app, ["compare", str(output), str(output)])
    assert compared.exit_code == 0 and compared.stdout.count("tome") == 4


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_a_folder_of_a_transformers_model(tmp_path, kind):
    model, tokenizer = transformers_model(kind), build_open_clip_tokenizer()
    images = CLIPImageProcessor(size={"height": 28, "width": 28}, do_center_crop=False)
    processor = (CLIPProcessor if kind == "clip" else SiglipProcessor)(images, tokenizer)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    config = {
        **{"model": str(tmp_path / "model"), "task": "digitscenes_colours", "limit": 4, "keep_ratios": [0.5]},
        **{"baselines": ["full"], "methods": ["tome"], "attention": "eager"},
    }
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(config))
    full, half = run(load_config(tmp_path / "file.yaml", output=tmp_path / "output"))
    assert (full["final_tokens"], half["final_tokens"]) == (16, 8)
    task = open_task("digitscenes_colours")
    classifier = ZeroShotClassifier(model, processor, task.classes, task.templates)
    with vtprune.prune(model, "tome", keep_ratio=0.5):
        said = classifier.predict([example.image for example in task.examples(4)])
    assert [r["prediction"] for r in cell_records(tmp_path / "output", half["cell"])] == said
    assert [r["answer"] for r in cell_records(tmp_path / "output", half["cell"])] == [
        item.colour for item in digitscenes.labelled_images(limit=4)
    ]
    assert "open_clip_torch" not in full["versions"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "digitscenes"}, "task 'digitscenes' asks questions, and model 'digitscenes_clip' is a CLIP"),
        ({"task": [TASK, "digitscenes"]}, "task 'digitscenes' asks questions"),
        ({"model": "digitscenes"}, "has classes for a CLIP to tell apart, and model 'digitscenes' is none"),
        ({"baselines": ["full", "zero"]}, "baselines: digitscenes_digits has no zero; give baselines: .full."),
        ({"max_new_tokens": 3}, "max_new_tokens: digitscenes_digits has classes"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_runs(config_file, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(load_config(config_file, changes, output=tmp_path / "output"))
    assert not (tmp_path / "output").exists()


def test_a_dry_run_says_that_it_does_not_estimate_a_clip(config_file):
    result = CliRunner().invoke(app, ["eval", str(config_file), "--dry-run"])
    assert result.exit_code == 2
    assert "--dry-run: digitscenes_digits is a task of classes, whose cost is not estimated" in result.stderr


def test_models_that_cannot_be_loaded_as_classifiers(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="models of open_clip run with 'sdpa' only, got 'eager'"):
        classifiers.load_classifier("digitscenes_clip", attention="eager")
    with pytest.raises(ConfigError, match=f"model '{tmp_path}' cannot be loaded"):
        classifiers.is_classifier(str(tmp_path))
    monkeypatch.setattr(classifiers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"digitscenes_clip' needs open_clip: pip install \"vtprune\[clip\]\""):
        classifiers.load_classifier("digitscenes_clip")


def test_tasks_are_the_images_with_one_digit():
    for name, label, corruption in (
        ("digitscenes_digits", "digit", None),
        ("digitscenes_colours", "colour", None),
        *((f"digitscenes_digits_{corruption}", "digit", corruption) for corruption in digitscenes.CORRUPTIONS),
    ):
        task = open_task(name)
        items = digitscenes.labelled_images(limit=2, corruption=corruption, severity=2)
        examples = task.examples(2)
        assert [e.image.tobytes() for e in examples] == [i.image.tobytes() for i in items]
        assert [(e.answer, e.family) for e in examples] == [(getattr(i, label),) * 2 for i in items]
        assert (task.classes, task.templates) == (digitscenes.CLASSES[label], digitscenes.TEMPLATES[label])
        answer = examples[0].answer
        assert (task.score(answer, examples[0]), task.score(f"{answer}0", examples[0])) == (1.0, 0.0)


def test_the_shipped_file_compares_the_methods_inside_encoder_layers():
    config = load_config("clip")
    cells = expand(config)
    methods = {"tome", "mctf", "zero_tprune", "tca", "random_patches", "uniform_patches", "glsim_patches"}
    assert {cell.method for cell in cells} == methods | {"full"}
    assert len(cells) == 1 + 4 * (7 + 3) and str(config.output) == "results/clip"
    evaluator.refuse_mismatches(config, open_tasks(config.task))
    assert Identity.of(config, open_task(TASK), [], str(digitscenes.OPEN_CLIP_PATH)).versions["open_clip_torch"]
