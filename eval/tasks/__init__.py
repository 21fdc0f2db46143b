# SPDX-License-Identifier: Apache-2.0
"""Tasks: examples with an image or a video, a question and an answer, and the function that scores a prediction.

A vision-language model answers the questions of a `Task`. A CLIP names the class of each image of a `Classification`.
`TASKS` maps a name to a function that loads the task, so that listing tasks loads none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

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


@dataclass(frozen=True)
class Classification:
    """Images, and the classes that a CLIP tells apart by prompts."""

    examples: Callable[[int | None], Sequence[ImageExample]]
    """as of `Task`; an answer is the name of a class"""
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    """prompts, with {} for the name of the class"""
    kind: ClassVar[Kind] = "image"

    @staticmethod
    def score(prediction: str, answer: str) -> float:
        """1.0 for the right class, else 0.0."""
        return float(prediction == answer)


AnyTask = Task | Classification


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


@dataclass(frozen=True)
class _Labelled:
    """An image whose class is asked for."""

    image: Image
    question: str
    answer: str

    @property
    def family(self) -> str:
        """The class, so that tables show each of them."""
        return self.answer


_SEVERITY = 2
"""Of the corruptions: they cost a good part of the accuracy, and leave a good part."""


def _labelled(label: str, corruption: str | None = None) -> Classification:
    """Images of DigitScenes with one digit; label: "digit" or "colour"."""
    from vtprune.eval import digitscenes

    def examples(limit: int | None) -> list[_Labelled]:
        count = digitscenes.LABELLED_SIZE if limit is None else limit
        items = digitscenes.labelled_images("test", count, corruption=corruption, severity=_SEVERITY)
        return [_Labelled(item.image, f"what {label} ?", getattr(item, label)) for item in items]

    return Classification(examples, digitscenes.CLASSES[label], digitscenes.TEMPLATES[label])


TASKS: dict[str, Callable[[], AnyTask]] = {
    "digitscenes": _digitscenes,
    "digitscenes_video": _digitscenes_video,
    "digitscenes_digits": lambda: _labelled("digit"),
    "digitscenes_colours": lambda: _labelled("colour"),
    "digitscenes_digits_noise": lambda: _labelled("digit", "noise"),
    "digitscenes_digits_blur": lambda: _labelled("digit", "blur"),
    "digitscenes_digits_contrast": lambda: _labelled("digit", "contrast"),
}
