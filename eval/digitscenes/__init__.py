# SPDX-License-Identifier: Apache-2.0
"""DigitScenes: a small visual-question-answering benchmark, with images and with videos, zero-shot classification of
single digits, and trained LLaVA and CLIP checkpoints that travel with it.

from vtprune.eval import digitscenes
model = AutoModelForImageTextToText.from_pretrained(digitscenes.MODEL_PATH)
processor = AutoProcessor.from_pretrained(digitscenes.MODEL_PATH)
for example in digitscenes.examples(limit=10): ...

model = AutoModelForImageTextToText.from_pretrained(digitscenes.VIDEO_MODEL_PATH)
for example in digitscenes.video_examples(limit=10): example.video_path() ...

model, tokenizer, preprocess = digitscenes.load_open_clip()
for item in digitscenes.labelled_images(limit=10, corruption="noise", severity=2): preprocess(item.image) ...
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vtprune.eval import tasks

from . import clip_questions
from .clip_questions import VIDEO_FAMILIES
from .clips import Clip, draw_clip
from .corruptions import CORRUPTIONS
from .labelled import CLASSES, LABELLED_SIZE, TEMPLATES, LabelledImage, labelled_images
from .mp4 import write_once
from .open_clip_model import OPEN_CLIP_PATH, load_open_clip
from .questions import FAMILIES, ask
from .scenes import SPLITS, draw_scene

MODEL_PATH = Path(__file__).parent / "model"
"""Folder of the trained checkpoint and its processor."""

VIDEO_MODEL_PATH = Path(__file__).parent / "video_model"
"""Folder of the checkpoint that was trained on clips, and its processor."""

SIZE = 1200
"""Questions in a set by default."""

VIDEO_SIZE = 300
"""Questions in a set about clips by default."""

__all__ = [
    "CLASSES",
    "CORRUPTIONS",
    "FAMILIES",
    "LABELLED_SIZE",
    "MODEL_PATH",
    "OPEN_CLIP_PATH",
    "SIZE",
    "TEMPLATES",
    "VIDEO_FAMILIES",
    "VIDEO_MODEL_PATH",
    "VIDEO_SIZE",
    "Example",
    "LabelledImage",
    "VideoExample",
    "example",
    "examples",
    "labelled_images",
    "load_open_clip",
    "score",
    "video_example",
    "video_examples",
]


@dataclass(frozen=True)
class Example(tasks.ImageExample):
    """One question about one scene.

    image: RGB, 168 x 168. question: plain text. answer: one word. family: a key of `FAMILIES`. index: its place in the
    set; every example has a scene of its own, so scores are independent.
    """

    image: Image.Image
    question: str
    answer: str
    family: str
    index: int


def example(index: int, split: str = "test", seed: int = 0) -> Example:
    """One example of the set that `examples` describes, without the others."""
    rng, family = _place(index, split, seed, list(FAMILIES))
    scene = draw_scene(rng, split)
    question = ask(rng, scene.digits, family)
    return Example(Image.fromarray(scene.pixels), question.text, question.answer, question.family, index)


def _place(index: int, split: str, seed: int, families: list[str]) -> tuple[np.random.RandomState, str]:
    """What an example is drawn with: numbers of its own, and its family."""
    return np.random.RandomState([seed, list(SPLITS).index(split), index]), families[index % len(families)]


def examples(split: str = "test", limit: int | None = None, seed: int = 0) -> list[Example]:
    """The first `limit` (default `SIZE`) examples of the set that `split` and `seed` name; the same on every machine.

    Families alternate, so that every prefix is balanced. `split` is "train", "validation" or "test"; no handwritten
    digit image is in two of them. A larger `limit` extends the set without changing its beginning.
    """
    return [example(index, split, seed) for index in range(SIZE if limit is None else limit)]


@dataclass(frozen=True)
class VideoExample(tasks.VideoExample):
    """One question about one clip.

    clip: draws the frames. question: plain text. answer: one word. family: a key of `VIDEO_FAMILIES`. index: its place
    in the set; every example has a clip of its own, so scores are independent.
    """

    clip: Clip
    question: str
    answer: str
    family: str
    index: int

    def frames(self) -> np.ndarray:
        """All frames, RGB, uint8 (frames, 112, 112, 3)."""
        return self.clip.frames()

    def video_path(self, folder: Path | None = None) -> Path:
        """The clip as an mp4 file, 12 frames a second, written on the first call.

        folder: default the cache for assets of huggingface_hub. The file's name says what is in it.
        """
        return write_once(self.frames(), folder)


def video_example(index: int, split: str = "test", seed: int = 0) -> VideoExample:
    """One example about a clip of the set that `video_examples` describes, without the others."""
    rng, family = _place(index, split, seed, list(VIDEO_FAMILIES))
    clip = draw_clip(rng, split, family)
    question = clip_questions.ask(rng, clip.actors, family)
    return VideoExample(clip, question.text, question.answer, question.family, index)


def video_examples(split: str = "test", limit: int | None = None, seed: int = 0) -> list[VideoExample]:
    """The first `limit` (default `VIDEO_SIZE`) examples about clips; as `examples` in everything else."""
    return [video_example(index, split, seed) for index in range(VIDEO_SIZE if limit is None else limit)]


def score(prediction: str, answer: str) -> float:
    """1.0 if `prediction` is the answer word (case, outer blanks and a final full stop do not count), else 0.0."""
    return float(prediction.strip().removesuffix(".").lower() == answer)
