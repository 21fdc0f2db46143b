# SPDX-License-Identifier: Apache-2.0
"""Tasks: examples with an image or a video, a question and an answer, and the function that scores a prediction.

`TASKS` maps a name to a function that loads the task, so that listing tasks loads none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from PIL.Image import Image

Kind = Literal["image", "video"]
"""Kind of a task's media, as adapters and chat templates name it."""


class Example(Protocol):
    """One question. The subclasses add the image or the video that it is about."""

    question: str
    answer: str
    family: str
    """kind of question, for the table per family"""


class ImageExample(Example, Protocol):
    """One question about one image."""

    image: Image
    """RGB"""


class VideoExample(Example, Protocol):
    """One question about one video."""

    def video_path(self) -> Path:
        """A file that PyAV can decode. It may be written on this call, which comes right before the example runs."""


@dataclass(frozen=True)
class Task:
    """A list of examples, and the function that scores answers to them."""

    examples: Callable[[int | None], Sequence[Example]]
    """number (None: all) -> the first examples, `ImageExample` or `VideoExample`, always in the same order"""
    score: Callable[[str, str], float]
    """(prediction, answer) -> 0..1"""
    max_new_tokens: int
    """enough for the longest answer and its end-of-sequence token"""
    kind: Kind = "image"
    """kind of the examples' media"""


def _digitscenes() -> Task:
    from vtprune.eval import digitscenes

    return Task(lambda limit: digitscenes.examples("test", limit=limit), digitscenes.score, max_new_tokens=4)


def _digitscenes_video() -> Task:
    from vtprune.eval import digitscenes

    return Task(
        lambda limit: digitscenes.video_examples("test", limit=limit),
        digitscenes.score,
        max_new_tokens=4,
        kind="video",
    )


TASKS: dict[str, Callable[[], Task]] = {"digitscenes": _digitscenes, "digitscenes_video": _digitscenes_video}
