# SPDX-License-Identifier: Apache-2.0
"""The tasks that come with the library, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL.Image import Image

from vtprune.eval.tasks.base import AnyTask, Classification, Example, ImageExample, Task


def _score(prediction: str, example: Example) -> float:
    from vtprune.eval import digitscenes

    return digitscenes.score(prediction, example.answer)


def _digitscenes() -> Task:
    from vtprune.eval import digitscenes

    return Task(lambda limit: digitscenes.examples("test", limit=limit), _score, max_new_tokens=4, digest=None)


def _digitscenes_video() -> Task:
    from vtprune.eval import digitscenes

    return Task(
        lambda limit: digitscenes.video_examples("test", limit=limit),
        _score,
        max_new_tokens=4,
        kind="video",
        digest=None,
    )


@dataclass(frozen=True)
class _Labelled(ImageExample):
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

    return Classification(examples, digitscenes.CLASSES[label], digitscenes.TEMPLATES[label], digest=None)


TASKS: dict[str, Callable[[], AnyTask]] = {
    "digitscenes": _digitscenes,
    "digitscenes_video": _digitscenes_video,
    "digitscenes_digits": lambda: _labelled("digit"),
    "digitscenes_colours": lambda: _labelled("colour"),
    "digitscenes_digits_noise": lambda: _labelled("digit", "noise"),
    "digitscenes_digits_blur": lambda: _labelled("digit", "blur"),
    "digitscenes_digits_contrast": lambda: _labelled("digit", "contrast"),
}
"""Name -> a function that makes the task, so that listing tasks makes none of them."""
