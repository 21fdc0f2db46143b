# SPDX-License-Identifier: Apache-2.0
"""Tasks by name: those of the library, and those of other packages, which may be broken."""

from dataclasses import replace

import pytest
import tiny_eval
import tiny_video
from PIL import Image

from vtprune.errors import ConfigError
from vtprune.eval.config import EvalConfig
from vtprune.eval.config_schema import json_schema
from vtprune.eval.tasks import TASKS, Task, open_task, open_tasks, task_names
from vtprune.eval.tasks.base import example_digest

MODULE = """
import tiny_eval
from vtprune.eval.tasks import Task

def mine():
    return Task(tiny_eval.examples, tiny_eval.score, max_new_tokens=3)

def fails():
    raise RuntimeError("no data here")

def wrong():
    return 3
"""


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    """Two packages with tasks."""
    tasks = {
        "First-Package": "mine = own_tasks:mine\nbroken = not_there:mine\nfails = own_tasks:fails\n"
        "both = own_tasks:mine",
        "Second-Package": "wrong = own_tasks:wrong\nboth = own_tasks:mine\ndigitscenes_video = own_tasks:mine",
    }
    for package, entries in tasks.items():
        folder = tmp_path / f"{package.replace('-', '_').lower()}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[vtprune.tasks]\n{entries}\n")
    (tmp_path / "own_tasks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_task_of_another_package_is_opened_by_its_name():
    task = open_task("mine")
    assert (task.name, task.entry, task.max_new_tokens) == ("mine", "mine", 3)
    assert [e.question for e in task.examples(2)] == [e.question for e in tiny_eval.examples(2)]
    assert task.rules and task.rules != open_task("digitscenes").rules
    config = EvalConfig(model="digitscenes", task=("mine", "digitscenes"), output="there", keep_ratios=(0.5,))
    assert list(open_tasks(config.task)) == ["mine", "digitscenes"]
    assert {"mine", "broken", "digitscenes"} <= set(task_names())
    named = json_schema()["properties"]["task"]["anyOf"][0]["anyOf"][0]["enum"]
    assert {"mine", "digitscenes"} <= set(named)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "broken",
            r"First-Package: its task 'broken' \(not_there:mine, group vtprune.tasks\) cannot be loaded: Module",
        ),
        ("fails", "First-Package: its task 'fails' .* cannot be loaded: RuntimeError: no data here"),
        ("wrong", "Second-Package: its task 'wrong' .* no function that returns a Task or a Classification, but int"),
        ("both", "task 'both' is in several packages: First-Package, Second-Package; keep one"),
        ("digitscenes_video", "task 'digitscenes_video' is in several packages: vtprune, Second-Package"),
        ("mime", "expected the name of a task .did you mean mine"),
    ],
)
def test_a_task_that_cannot_be_opened_names_its_package(name, said):
    with pytest.raises(ConfigError, match=said):
        open_task(name)


def test_the_digest_of_an_example_changes_with_its_media_and_its_texts():
    example, *_ = tiny_eval.examples(1)
    first = example_digest(example)
    assert first == example_digest(tiny_eval.examples(1)[0])
    changed = [replace(example, **{key: "other"}) for key in ("question", "answer", "family")]
    changed.append(replace(example, image=Image.new("RGB", example.image.size)))
    clip, other = tiny_video.examples(2)
    changed += [clip, replace(clip, path=other.path)]
    assert len({first, *map(example_digest, changed)}) == len(changed) + 1


def test_the_fingerprint_has_the_data_unless_code_alone_makes_them():
    def examples(answer):
        return lambda limit: [replace(e, answer=answer) for e in tiny_eval.examples(limit)]

    def fingerprint(answer, **given):
        task = Task(examples(answer), tiny_eval.score, max_new_tokens=3, **given)
        return task.fingerprint(task.digests(task.examples(3)))

    assert fingerprint("one") == fingerprint("one") != fingerprint("two")
    assert fingerprint("one", digest=None) == fingerprint("two", digest=None)
    assert {open_task(name).digest for name in TASKS if name.startswith("digitscenes_digits")} == {None}
