# SPDX-License-Identifier: Apache-2.0
"""The functions that the YAML files beside this one name. lmms-eval reads this file by its path."""

from __future__ import annotations

from functools import cache
from typing import Any

from datasets import Dataset

from vtprune.eval import digitscenes

Document = dict[str, Any]

_EXAMPLES = {
    "digitscenes": (digitscenes.SIZE, digitscenes.example),
    "digitscenes_video": (digitscenes.VIDEO_SIZE, digitscenes.video_example),
}


def documents(named: Dataset) -> Dataset:
    """All examples of the task that the first row of `named` names. Each is drawn when it is asked for."""
    task = named[0]["task"]
    size, draw = _EXAMPLES[task]
    draw = cache(draw)  # lmms-eval asks for a document several times

    def drawn(rows: dict[str, list[int]]) -> dict[str, list[Any]]:
        examples = [draw(index) for index in rows["index"]]
        media = [e.video_path() if task == "digitscenes_video" else e.image for e in examples]
        texts = {key: [getattr(e, key) for e in examples] for key in ("question", "answer", "family")}
        return {**rows, **texts, "medium": [str(medium) if task == "digitscenes_video" else medium for medium in media]}

    return Dataset.from_dict({"index": list(range(size))}).with_transform(drawn)


def visual(document: Document) -> list[Any]:
    """An RGB image, or the path of an mp4 file."""
    return [document["medium"]]


def question(document: Document) -> str:
    return document["question"]


def answer(document: Document) -> str:
    return document["answer"]


def score(document: Document, results: list[str]) -> dict[str, float]:
    return {"accuracy": digitscenes.score(results[0], document["answer"])}
