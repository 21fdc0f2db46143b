# SPDX-License-Identifier: Apache-2.0
"""Tasks of lmms-eval by name: which open, which are refused and why, and what their cells are keyed by."""

import json

import local_lmms
import pytest
import yaml
from PIL import Image

from vtprune.errors import ConfigError
from vtprune.eval.config import load_config
from vtprune.eval.config_schema import json_schema
from vtprune.eval.running.estimate import estimate_tables
from vtprune.eval.tasks import lmms_tasks, open_task, open_tasks
from vtprune.eval.tasks.lmms_tasks import open_lmms
from vtprune.eval.tasks.suites import suite_names, suite_table, suite_tasks

SCENES = f"include: {local_lmms.SCENES}\n"
BROKEN_CODE = """
import os

from vtprune.eval import digitscenes


def rounds(doc, **_):
    return doc["question"]


def ask(prompt):
    import requests

    return requests.post(os.environ["URL"], json=prompt, headers={"Authorization": KEYS["a"]}).json()


KEYS = {}


def judged(doc, results):
    return {"accuracy": float(ask(results[0]))}


def empty(doc):
    return ""


def missing(doc, results):
    return {"other": 1.0}


def sent(items, args):
    return None


def no_visual(doc):
    return []
"""
REFUSED = {
    "rounds": (
        "output_type: generate_until_multi_round\n",
        "output type 'generate_until_multi_round' is not supported",
    ),
    "asked_often": ("repeats: 4\n", "every document is asked 4 times"),
    "shots": ("num_fewshot: 2\n", r"prompts with examples \(num_fewshot\)"),
    "judge": ("process_results: !function broken.judged\n", "needs a judge.*--tasks judge --predict_only"),
    "hidden": ("doc_to_target: !function broken.empty\n", "its answers are hidden .the first documents have none"),
    "sent": (
        "metric_list: [{metric: submission, aggregation: !function broken.sent, higher_is_better: true}]\n",
        "its answers are hidden, so it has no score here",
    ),
    "text_only": ("doc_to_visual: !function broken.no_visual\n", "images or with videos, got text"),
    "no_function": ("doc_to_text: !function broken.nowhere\n", "lmms-eval cannot load it: .*nowhere"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = local_lmms.write(tmp_path_factory.mktemp("tasks"))
    for name, (text, _) in REFUSED.items():
        (folder / f"{name}.yaml").write_text(f"{SCENES}task: {name}\n{text}")
    (folder / "broken.py").write_text(BROKEN_CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        yield folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scored_is_refused_with_its_reason(folder, name):
    with pytest.raises(ConfigError, match=f"lmms:{name}: .*{REFUSED[name][1]}"):
        open_lmms(name, [folder])


def test_unknown_names(folder, tmp_path):
    with pytest.raises(ConfigError, match="lmms:pairz: lmms-eval has no such task; did you mean pairs"):
        open_lmms("pairz", [folder])
    for task in ("lmms:pairs", "digitscenes"):
        with pytest.raises(ConfigError, match="include_path: .*nowhere: no such folder"):
            open_tasks([task], [tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="task 'pairs' is there twice, as lmms:pairs and lmms:pairs"):
        open_tasks(["lmms:pairs", "lmms:both"], [folder])
    with pytest.raises(ConfigError, match="lmms:both is a group of 2 tasks"):
        open_task("lmms:both", [folder])


def test_documents_that_the_task_cannot_score_are_found_before_a_model_is_loaded(folder, monkeypatch):
    pairs = open_task("lmms:pairs", [folder])
    pairs.rehearse(pairs.examples(4))
    with pytest.raises(ConfigError, match="the aggregation of pair_points fails: AssertionError: pairs only"):
        pairs.rehearse(pairs.examples(3))
    monkeypatch.setattr(lmms_tasks, "_REHEARSED", 2)
    pairs.rehearse(pairs.examples(3))
    for name in ("choices", "greedy", "first_word"):
        task = open_task(f"lmms:{name}", [folder])
        task.rehearse(task.examples(2))


def test_a_document_is_an_example(folder):
    task = open_task("lmms:choices", [folder])
    assert (task.name, task.entry, task.kind, task.generates) == ("choices", "lmms:choices", "image", False)
    first = task.examples(3)[0]
    assert (first.question, first.answer, first.family) == ("what digit is green ?", "8", "digit")
    assert len(first.requests()) == 4
    ((turn,), (other,)) = (first.prompt(first.requests()[place]) for place in (0, 3))
    assert [part["type"] for part in turn["content"]] == ["image", "text"] and turn["role"] == "user"
    assert other["content"][1] == turn["content"][1]
    (turn,) = open_task("lmms:two_images", [folder]).examples(1)[0].conversation()
    assert [part["type"] for part in turn["content"]] == ["image", "image", "text"]


def test_digests_and_rules_change_with_what_decides(tmp_path, monkeypatch):
    def opened():
        lmms_tasks._manager.cache_clear()
        task = open_task("lmms:own", [tmp_path])
        return task.rules, task.digests(task.examples(2))

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rows = [{"question": f"word{i}", "answer": "one", "path": str(tmp_path / "a.png")} for i in range(2)]
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code = "from PIL import Image\n\ndef visual(doc):\n    return [Image.open(doc['path'])]\n"
    (tmp_path / "own.py").write_text(code)
    text = (
        "task: own\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_visual: !function own.visual\ndoc_to_text: question\n"
        "doc_to_target: answer\nmetric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (tmp_path / "own.yaml").write_text(text)
    rules, digests = opened()
    assert opened() == (rules, digests) and len(set(digests)) == 2
    (tmp_path / "own.yaml").write_text(text + "metadata: [{version: 2.0}]\n")
    assert opened() != (rules, digests) and opened()[1] == digests
    (tmp_path / "own.yaml").write_text(text)
    (tmp_path / "own.py").write_text(code + "# other\n")
    assert opened()[0] != rules
    (tmp_path / "own.py").write_text(code)
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "a.png")
    assert opened()[0] == rules and set(opened()[1]).isdisjoint(digests)
    lmms_tasks._manager.cache_clear()


def config(tmp_path, **settings):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"model": "digitscenes", "keep_ratios": [0.5], "limit": 2, **settings}))
    return load_config(path)


def test_suites_are_the_files_of_configs_lmms(tmp_path, monkeypatch):
    assert set(suite_names()) >= {"images", "videos", "documents"}
    listed = [task for name in suite_names() for task in suite_tasks(name)]
    assert sorted(listed) == sorted(suite_table())
    opened = []
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(lmms_tasks, "open_lmms", lambda name, include_path: opened.append((name, include_path)) or [])
    settings = config(tmp_path, task="suite:documents", include_path="mine")
    open_tasks(settings.task, settings.include_path)
    assert opened == [(name, (tmp_path / "mine",)) for name in ("ocrbench", "docvqa_val", "chartqa")]
    with pytest.raises(ConfigError, match="suite:image: there is no such suite; did you mean images"):
        config(tmp_path, task="suite:image")
    with pytest.raises(ConfigError, match="expected the name of a task of lmms-eval behind lmms:"):
        config(tmp_path, task=["lmms:"])


def test_the_schema_and_the_dry_run_know_them(folder, tmp_path):
    schema = json_schema()["properties"]
    names, pattern, _ = schema["task"]["anyOf"][0]["anyOf"]
    assert "suite:images" in names["enum"] and pattern["pattern"] == "^lmms:.+"
    assert schema["include_path"]["anyOf"][0] == {"type": "string"}
    settings = config(tmp_path, task="lmms:two_images", include_path=[str(folder)], methods=["divprune"])
    (table,) = estimate_tables(settings)
    assert table.title == "two_images, digitscenes: 4 cells"
    assert list(table.columns[1].cells) == ["288.0", "0.0", "144.0", "144.0"]
