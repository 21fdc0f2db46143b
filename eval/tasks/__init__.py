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
"""What a task shows, in the words of the adapters and of chat templates."""


class Example(Protocol):
    """One question, about what the subclasses add."""

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
        """A file that PyAV can decode; asked for when the example is about to run, so it may be written only then."""


@dataclass(frozen=True)
class Task:
    """A named list of examples and how answers to them are scored."""

    examples: Callable[[int | None], Sequence[Example]]
    """the first so many examples (None: all), always in the same order; `ImageExample` or `VideoExample`"""
    score: Callable[[str, str], float]
    """(prediction, answer) -> 0..1"""
    max_new_tokens: int
    """what the longest answer needs, end-of-sequence token included"""
    kind: Kind = "image"
    """what the examples show"""


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
