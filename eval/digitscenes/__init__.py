# SPDX-License-Identifier: Apache-2.0
"""DigitScenes: a small visual-question-answering benchmark with a trained LLaVA checkpoint that travels with it.

from vtprune.eval import digitscenes
model = AutoModelForImageTextToText.from_pretrained(digitscenes.MODEL_PATH)
processor = AutoProcessor.from_pretrained(digitscenes.MODEL_PATH)
for example in digitscenes.examples(limit=10): ...
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .questions import FAMILIES, ask
from .scenes import SPLITS, draw_scene

MODEL_PATH = Path(__file__).parent / "model"
"""Folder of the trained checkpoint and its processor."""

SIZE = 1200
"""Questions in a set by default."""

__all__ = ["FAMILIES", "MODEL_PATH", "SIZE", "Example", "examples", "score"]


@dataclass(frozen=True)
class Example:
    """One question about one scene.

    image: RGB, 168 x 168. question: plain text. answer: one word. family: a key of `FAMILIES`. index: its place in the
    set; every example has a scene of its own, so scores are independent.
    """

    image: Image.Image
    question: str
    answer: str
    family: str
    index: int


def examples(split: str = "test", limit: int | None = None, seed: int = 0) -> list[Example]:
    """The first `limit` (default `SIZE`) examples of the set that `split` and `seed` name; the same on every machine.

    Families alternate, so that every prefix is balanced. `split` is "train", "validation" or "test"; no handwritten
    digit image is in two of them. A larger `limit` extends the set without changing its beginning.
    """
    families = list(FAMILIES)
    drawn = []
    for index in range(SIZE if limit is None else limit):
        rng = np.random.RandomState([seed, list(SPLITS).index(split), index])
        scene = draw_scene(rng, split)
        question = ask(rng, scene.digits, families[index % len(families)])
        image = Image.fromarray(scene.pixels)
        drawn.append(Example(image, question.text, question.answer, question.family, index))
    return drawn


def score(prediction: str, answer: str) -> float:
    """1.0 if `prediction` is the answer word (case, outer blanks and a final full stop aside), else 0.0."""
    return float(prediction.strip().removesuffix(".").lower() == answer)
