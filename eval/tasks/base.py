# SPDX-License-Identifier: Apache-2.0
"""What a task is: examples that state their prompts, and the function that scores a prediction."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from PIL.Image import Image

if TYPE_CHECKING:
    from vtprune.eval.results.aggregated import Metrics

Kind = Literal["image", "video"]
"""Kind of a task's media, as adapters and chat templates name it."""

Conversation = list[dict[str, Any]]
"""Turns with a `role` and a `content`, in the form of chat templates. A content is a list of parts. Each has a `type`
and, under the name of the type, what it shows: `image` an RGB image, `video` the path of a file as a text, `text` a
text."""

HEAD = 1 << 20
"""Of a large file the size and so many bytes, the first ones, are hashed."""


def user_turn(media: Sequence[Image] | Sequence[str | Path], text: str, kind: Kind = "image") -> dict[str, Any]:
    """A turn of the user: images or videos, then a text."""
    shown = [{"type": kind, kind: medium if kind == "image" else str(medium)} for medium in media]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


class Example(Protocol):
    """One question about images or a video. A prompt has at least one, and all media of a task are of one kind."""

    question: str
    answer: str
    """for people, and for scores that need no more; a score sees the whole example"""
    family: str
    """kind of question, for the table per family"""

    def conversation(self) -> Conversation:
        """The prompt. Media are opened on this call, which comes right before the example runs."""


class ImageExample(Example, Protocol):
    """One question about one image. A class that derives from this one has `conversation` from it."""

    image: Image
    """RGB"""

    def conversation(self) -> Conversation:
        return [user_turn([self.image], self.question)]


class VideoExample(Example, Protocol):
    """One question about one video. A class that derives from this one has `conversation` from it."""

    def video_path(self) -> Path:
        """A file that PyAV can decode. It may be written on this call."""

    def conversation(self) -> Conversation:
        return [user_turn([self.video_path()], self.question, "video")]


def shown(conversation: Conversation, kind: Kind) -> list[Any]:
    """The images or the videos of a prompt, in their order."""
    return [part[kind] for turn in conversation for part in turn["content"] if part["type"] == kind]


def kinds_of(conversation: Conversation) -> set[str]:
    """Kinds of the media in a prompt."""
    return {part["type"] for turn in conversation for part in turn["content"]} - {"text"}


def example_digest(example: Example) -> str:
    """16 hex digits that change with the prompt, the pixels of its images, its videos, and the fields in JSON types."""
    digest = hashlib.sha256()
    fields = {"question": example.question, "answer": example.answer, "family": example.family}
    named = (
        [field.name for field in dataclasses.fields(example)] if dataclasses.is_dataclass(example) else vars(example)
    )
    fields |= {name: value for name in named if _is_plain(value := getattr(example, name))}
    digest.update(json.dumps(fields, sort_keys=True).encode())
    for turn in example.conversation():
        for part in turn["content"]:
            medium = part[part["type"]]
            digest.update(f"{turn['role']} {part['type']} ".encode())
            if isinstance(medium, Image):
                digest.update(f"{medium.mode} {medium.size} ".encode() + medium.tobytes())
            elif part["type"] == "video":
                digest.update(file_digest(Path(medium)).encode())
            else:
                digest.update(str(medium).encode())
    return digest.hexdigest()[:16]


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def file_digest(path: Path) -> str:
    """Hash of the size and the first MiB of a file, so that gigabytes need not be read."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    return hashlib.sha256(f"{path.stat().st_size}\n".encode() + head).hexdigest()


@dataclass(frozen=True, kw_only=True)
class BaseTask:
    """What every task says of itself. `open_task` sets all but `digest`."""

    digest: Callable[[Any], str] | None = example_digest
    """example -> a text that changes with it; None if the examples follow from the source code of the task alone"""
    name: str = ""
    """unique among the tasks of a run"""
    entry: Any = None
    """what opens the task again: its entry in an evaluation file, in JSON types"""
    rules: str = ""
    """hash of what decides beside the examples how they are asked and scored: source code, settings"""

    @property
    def metrics(self) -> Metrics | None:
        """What makes the score of a cell out of its records; None: the score is the mean over the examples."""
        return None

    def rehearse(self, examples: Sequence[Any]) -> None:
        """Raises ConfigError for what would fail only after the model has answered `examples`."""

    def digests(self, examples: Sequence[Example]) -> list[str]:
        """Of each example; none if they follow from the source code."""
        return [] if self.digest is None else [self.digest(example) for example in examples]

    def fingerprint(self, digests: Sequence[str]) -> str:
        """16 hex digits that change if the examples, whose `digests` are given, or the way they are scored changes."""
        return hashlib.sha256(json.dumps([self.rules, *digests]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Task(BaseTask):
    """A list of examples, and the function that scores answers to them."""

    examples: Callable[[int | None], Sequence[Example]]
    """number (None: all) -> the first examples, always in the same order"""
    score: Callable[[str, Any], float]
    """(prediction, example) -> 0..1"""
    max_new_tokens: int
    """enough for the longest answer and its end-of-sequence token"""
    kind: Kind = "image"
    """kind of the examples' media"""


@dataclass(frozen=True)
class Classification(BaseTask):
    """Images, and the classes that a CLIP tells apart by prompts."""

    examples: Callable[[int | None], Sequence[ImageExample]]
    """as of `Task`; an answer is the name of a class"""
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    """prompts, with {} for the name of the class"""
    kind: ClassVar[Kind] = "image"

    @staticmethod
    def score(prediction: str, example: Example) -> float:
        """1.0 for the right class, else 0.0."""
        return float(prediction == example.answer)


AnyTask = Task | Classification
