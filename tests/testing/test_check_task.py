# SPDX-License-Identifier: Apache-2.0
"""`check_task` passes tasks that are right, and names what is wrong with others."""

import json
import random
from dataclasses import dataclass, replace

import pytest
from PIL import Image

from vtprune.eval.tasks import TASKS, FileTask, ImageExample, Task
from vtprune.testing import PromiseBroken, check_task


@dataclass(frozen=True)
class Example(ImageExample):
    image: Image.Image
    question: str = "what colour ?"
    answer: str = "red"
    family: str = "colour"


EXAMPLES = [Example(Image.new("RGB", (8, 8), name), answer=name) for name in ("red", "green", "blue", "white")]


def right(prediction, example):
    return float(prediction == example.answer)


def task(change=lambda examples, limit: examples, score=right, **fields):
    """The examples, changed by `change` before the first `limit` of them are given."""
    return Task(lambda limit: list(change(EXAMPLES, limit))[:limit], score, **{"max_new_tokens": 3} | fields)


@pytest.mark.parametrize("name", ["digitscenes", "digitscenes_colours"])
def test_the_tasks_of_the_library(name):
    assert name in TASKS and {result.status for result in check_task(name, 4)} == {"ok"}


def test_a_task_of_a_file(tmp_path):
    EXAMPLES[0].image.save(tmp_path / "red.png")
    rows = [
        {"image": "red.png", "question": f"{number}?", "choices": ["red", "blue"], "answer": answer}
        for number, answer in enumerate(["A", "red", "blue"])
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(check_task(FileTask(file=tmp_path / "mine.jsonl"))) == 6


def test_a_task_that_is_right():
    assert all(result.passed for result in check_task(task()))


def grey(examples, limit):
    return [replace(example, image=example.image.convert("L")) for example in examples]


def shuffled(examples, limit):
    return random.Random(limit).sample(examples, len(examples))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (task(lambda examples, limit: []), "examples are there: there is no example"),
        (
            task(lambda examples, limit: [replace(examples[0], family=" ")]),
            "examples are there: the family of example 0 is ' ', expected a text",
        ),
        (task(shuffled), "examples are the same each time: example 0 is"),
        (
            task(lambda examples, limit: examples[:1] if limit == 2 else examples),
            "of 2 examples that are asked for, 1 come",
        ),
        (task(grey), "prompts show media of the kind: an image of example 0 is L, expected RGB"),
        (task(kind="video"), "prompts show media of the kind: example 0 shows image; the task says video"),
        (task(score=lambda prediction, example: 100 * right(prediction, example)), "'red', scores 100.0"),
        (task(score=lambda prediction, example: 1.0), "scores: an empty prediction scores 1.0 in example 0"),
        (task(score=lambda prediction, example: example.gold), "scores: AttributeError"),
        (task(max_new_tokens=0), "answers fit: max_new_tokens is 0"),
        (task(digest=lambda example: "same"), "digests follow the data: the digest of example 0 does not change"),
        (task(digest=lambda example: str(random.random())), "digests follow the data: the digests of the same"),
    ],
)
def test_what_is_wrong_is_named(broken, said):
    with pytest.raises(PromiseBroken) as caught:
        check_task(broken, 4)
    assert said in str(caught.value)
