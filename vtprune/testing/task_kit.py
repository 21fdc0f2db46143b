# SPDX-License-Identifier: Apache-2.0
"""`check_task`: whether a task is what an evaluation relies on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL.Image import Image

from vtprune.eval.tasks import AnyTask, Classification, Example, FileTask, kinds_of, open_task, shown
from vtprune.eval.tasks.base import BaseTask
from vtprune.testing.cases import PromiseBroken, Result


def check_task(task: str | FileTask | AnyTask, limit: int | None = 20) -> list[Result]:
    """Raise PromiseBroken, an AssertionError, unless a task is what an evaluation relies on. No model is needed.

    The examples are the same each time, and a limit gives the first of them; every prompt has a question and media of
    the task's kind; the answer of an example scores 1, nothing scores less, and all scores are from 0 to 1; a digest
    stays while the data stay, and changes with the answer.

    Args:
        task: its name, a `FileTask`, or the task itself.
        limit: number of examples that are looked at, the first ones; None: all.
    Returns:
        What every check found.
    Raises:
        PromiseBroken: its message names what is not so, and the example. ConfigError: the task cannot be opened.
    """
    opened = task if isinstance(task, BaseTask) else open_task(task)
    examples = list(opened.examples(limit))
    results = [_result(name, check, opened, examples) for name, check in _CHECKS.items()]
    broken = [result for result in results if not result.passed]
    if broken:
        lines = "\n".join(f"* {result.check}: {result.detail}" for result in broken)
        raise PromiseBroken(f"this task breaks {len(broken)} of {len(results)} promises:\n{lines}", results)
    return results


Check = Callable[[AnyTask, Sequence[Example]], Iterator[str]]
"""(task, its first examples) -> what is wrong"""


def _result(name: str, check: Check, task: AnyTask, examples: Sequence[Example]) -> Result:
    try:
        problem = next(check(task, examples), None)
    except Exception as error:
        return Result(name, "", "error", detail=f"{type(error).__name__}: {error}")
    return Result(name, "", "ok" if problem is None else "failed", detail=problem or "")


def _texts(example: Example) -> tuple[str, str, str]:
    return example.question, example.answer, example.family


def _there(task: AnyTask, examples: Sequence[Example]) -> Iterator[str]:
    if not examples:
        yield "there is no example"
    for index, example in enumerate(examples):
        for name, text in zip(("question", "answer", "family"), _texts(example), strict=True):
            if not isinstance(text, str) or not text.strip():
                yield f"the {name} of example {index} is {text!r}, expected a text"


def _repeated(task: AnyTask, examples: Sequence[Example]) -> Iterator[str]:
    again = list(task.examples(len(examples)))
    if len(again) != len(examples):
        yield f"of {len(examples)} examples that are asked for, {len(again)} come"
    fewer = list(task.examples(len(examples) // 2))
    if len(fewer) != len(examples) // 2:
        yield f"of {len(examples) // 2} examples that are asked for, {len(fewer)} come"
    for name, others in (("asked for again", again), ("of a smaller number", fewer)):
        for index, (example, other) in enumerate(zip(examples, others, strict=False)):
            if _texts(example) != _texts(other):
                yield f"example {index} is {_texts(example)}, and {name} {_texts(other)}"


def _prompts(task: AnyTask, examples: Sequence[Example]) -> Iterator[str]:
    from vtprune.eval.inputs import read_frames

    for index, example in enumerate(examples):
        conversation = example.conversation()
        kinds = kinds_of(conversation)
        if conversation[-1]["role"] != "user":
            yield f"the last turn of example {index} is not the user's"
        if kinds != {task.kind}:
            yield f"example {index} shows {', '.join(sorted(kinds)) or 'nothing'}; the task says {task.kind}"
        for medium in shown(conversation, task.kind):
            if task.kind == "video":
                read_frames(medium, lambda metadata: [0])
            elif not isinstance(medium, Image) or medium.mode != "RGB":
                yield f"an image of example {index} is {getattr(medium, 'mode', type(medium).__name__)}, expected RGB"


def _scores(task: AnyTask, examples: Sequence[Example]) -> Iterator[str]:
    said = ["", *dict.fromkeys(example.answer for example in examples), "an answer that is wrong"]
    for index, example in enumerate(examples):
        if (own := task.score(example.answer, example)) != 1:
            yield f"the answer of example {index}, {example.answer!r}, scores {own}"
        for prediction in said:
            if not 0 <= (score := task.score(prediction, example)) <= 1:
                yield f"{prediction!r} scores {score} in example {index}"
        if (score := task.score("", example)) == 1:
            yield f"an empty prediction scores {score} in example {index}"


def _classes(task: AnyTask, examples: Sequence[Example]) -> Iterator[str]:
    if isinstance(task, Classification):
        for index, example in enumerate(examples):
            if example.answer not in task.classes:
                yield f"the answer of example {index}, {example.answer!r}, is none of the classes"
    elif task.max_new_tokens < 1:
        yield f"max_new_tokens is {task.max_new_tokens}"


def _digests(task: AnyTask, examples: Sequence[Example]) -> Iterator[str]:
    digests = task.digests(examples)
    if digests != task.digests(list(task.examples(len(examples)))):
        yield "the digests of the same examples are others when they are asked for again"
    for index, (example, digest) in enumerate(zip(examples, digests, strict=False)):
        other = _with_other_answer(example)
        if other is not None and task.digests([other]) == [digest]:
            yield f"the digest of example {index} does not change with its answer"
    for first, second in zip(range(len(digests)), range(1, len(digests)), strict=False):
        if digests[first] == digests[second] and _texts(examples[first]) != _texts(examples[second]):
            yield f"examples {first} and {second} have one digest"


def _with_other_answer(example: Any) -> Any:
    """None if that cannot be made: the example is no dataclass, or its answer no field."""
    if not dataclasses.is_dataclass(example) or "answer" not in {field.name for field in dataclasses.fields(example)}:
        return None
    return dataclasses.replace(example, answer=f"{example.answer} other")  # type: ignore[type-var]


_CHECKS: dict[str, Check] = {
    "examples are there": _there,
    "examples are the same each time": _repeated,
    "prompts show media of the kind": _prompts,
    "scores": _scores,
    "answers fit": _classes,
    "digests follow the data": _digests,
}
