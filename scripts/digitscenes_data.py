# SPDX-License-Identifier: Apache-2.0
"""Training data of `train_digitscenes.py`: scenes with labels, packed prompts, and choices of visual tokens."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from vtprune.eval.digitscenes.model import GRID, PATCH_SIZE, VISUAL_TOKENS
from vtprune.eval.digitscenes.questions import DIRECTIONS, ask
from vtprune.eval.digitscenes.scenes import COLOURS, IMAGE_SIZE, Digit, digit_images, draw_scene
from vtprune.eval.digitscenes.video_model import VIDEO_VOCABULARY

COLOUR_NAMES = list(COLOURS)
WORD = {word: i for i, word in enumerate(VIDEO_VOCABULARY)}  # the image model's words come first
PREFIX = ["<s>", "user:"]
"""The words before the visual tokens."""

IGNORE = -100


@dataclass
class Data:
    """Scenes of one split with labels for the encoder; tensors have one row for each scene.

    pixels: uint8 (scenes, 3, 168, 168). digit and colour: (scenes, 144), 0 is background. centre: (scenes, 144, 2),
    the digit's centre in image units. source: (scenes, 144), its row in images, the split's handwritten digits (images,
    64) in 0..1. bag: (scenes, 18), which digits and colours occur.
    """

    digits: list[tuple[Digit, ...]]
    pixels: torch.Tensor
    digit: torch.Tensor
    colour: torch.Tensor
    centre: torch.Tensor
    source: torch.Tensor
    bag: torch.Tensor
    images: torch.Tensor

    @classmethod
    def draw(cls, count: int, split: str, seed: int) -> "Data":
        digits = []
        pixels = np.empty((count, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
        digit, colour, source = np.zeros((3, count, GRID * GRID), np.int64)
        centre, bag = np.zeros((count, GRID * GRID, 2), np.float32), np.zeros((count, 18), np.float32)
        images = digit_images(split)
        first = np.cumsum([0, *map(len, images)])
        for n in range(count):
            scene = draw_scene(np.random.RandomState([seed, n]), split)
            digits.append(scene.digits)
            pixels[n] = scene.pixels.transpose(2, 0, 1)
            owner = patch_owners(scene.mask[None], PATCH_SIZE, 12)[0]
            for i, item in enumerate(scene.digits):
                on = owner == i + 1
                digit[n, on], colour[n, on] = item.value + 1, COLOUR_NAMES.index(item.colour) + 1
                source[n, on] = first[item.value] + item.image
                centre[n, on] = np.array(item.centre) / IMAGE_SIZE
                bag[n, item.value] = bag[n, 10 + COLOUR_NAMES.index(item.colour)] = 1
        table = np.concatenate([np.stack(of_value) for of_value in images]).reshape(-1, 64).astype(np.float32) / 255
        return cls(digits, *map(torch.from_numpy, (pixels, digit, colour, centre, source, bag, table)))


def patch_owners(masks: np.ndarray, side: int, least: int) -> np.ndarray:
    """The digit on which each patch of `side` pixels lies, uint8 (images, patches).

    `i + 1` stands for digit i, if it has more ink there than the others and at least `least` pixels; else 0. masks: as
    `Scene.mask`, (images, height, width).
    """
    images, size = len(masks), masks.shape[1]
    grid = size // side
    patches = masks.reshape(images, grid, side, grid, side).transpose(0, 1, 3, 2, 4).reshape(images, grid * grid, -1)
    ink = np.stack([(patches == i + 1).sum(-1) for i in range(max(1, masks.max()))])
    return np.where(ink.max(0) >= least, ink.argmax(0) + 1, 0).astype(np.uint8)


def model_input(pixels: torch.Tensor, device) -> torch.Tensor:
    """The pixel values that the processor makes from uint8 (images, 3, 168, 168)."""
    return pixels.to(device).float().div(255).sub(0.3).div(0.3)


@dataclass
class Block:
    """One prompt with its answer, which follow the visual tokens. target[i] is the word to predict after words[i]."""

    words: list[str]
    target: list[str | None]
    family: str

    @classmethod
    def make(cls, prompt: str, answer: list[str], family: str, *, every: int = 1) -> "Block":
        """`every=2`: only the second, fourth, ... answer word is predicted (the words between are given)."""
        words = [*prompt.split(), "assistant:", *answer]
        target: list[str | None] = [None] * len(words)
        start = len(words) - len(answer)
        for i in range(start + every - 1, len(words), every):
            target[i - 1] = words[i]
        target[-1] = "</s>"
        return cls(words, target, family)


def caption_blocks(rng, digits) -> list[Block]:
    """Lists of the digits in a scene: both pairings, two spatial orders, one order of value."""
    blocks = []
    for prompt, pair in (("list colour digit", (0, 1)), ("list digit colour", (1, 0))):
        answer = []
        for i in rng.permutation(len(digits)):
            words = digits[i].colour, str(digits[i].value)
            answer += [words[pair[0]], words[pair[1]]]
        blocks.append(Block.make(prompt, answer, "pairs", every=2))
    for i in rng.permutation(4)[:2]:
        name, key = list(DIRECTIONS.items())[i]
        blocks.append(Block.make(f"list {name} first", [str(d.value) for d in sorted(digits, key=key)], "spatial"))
    word, sign = (("larger", -1), ("smaller", 1))[rng.randint(2)]
    order = sorted(digits, key=lambda digit: sign * digit.value)
    blocks.append(Block.make(f"list {word} first", [d.colour for d in order], "value"))
    return blocks


def question_blocks(rng, digits, families) -> list[Block]:
    questions = [ask(rng, digits, family) for family in families]
    return [Block.make(question.text, [question.answer], question.family) for question in questions]


@dataclass
class Pack:
    """Blocks of several scenes, right-padded to (scenes, length).

    words, number of the block (0 is padding), place in the block, and the target words (`IGNORE` if there is none).
    families names the block of each predicted word except "</s>".
    """

    ids: torch.Tensor
    block: torch.Tensor
    place: torch.Tensor
    target: torch.Tensor
    families: list[str]

    @classmethod
    def of(cls, scenes: list[list[Block]]) -> "Pack":
        length = max(sum(len(b.words) for b in blocks) for blocks in scenes)
        ids, block, place = np.zeros((3, len(scenes), length), np.int64)
        target, families = np.full((len(scenes), length), IGNORE), []
        for n, blocks in enumerate(scenes):
            start = 0
            for k, b in enumerate(blocks):
                columns = slice(start, start + len(b.words))
                ids[n, columns], block[n, columns] = [WORD[w] for w in b.words], k + 1
                place[n, columns] = np.arange(len(b.words))
                target[n, columns] = [IGNORE if w is None else WORD[w] for w in b.target]
                families += [b.family for w in b.target if w not in (None, "</s>")]
                start = columns.stop
        return cls(*map(torch.from_numpy, (ids, block, place, target)), families)

    @property
    def answers(self) -> torch.Tensor:
        """True where a word of an answer, but not its "</s>", is predicted: (scenes, length)."""
        return (self.target != IGNORE) & (self.target != WORD["</s>"])


def random_tokens(rng, on_digit: torch.Tensor, count: int, bias: float = 0.0) -> torch.Tensor:
    """`count` visual tokens of each scene, ascending (scenes, count).

    They are uniformly random if `bias` is 0; from 1 on, digits come first. on_digit: (scenes, tokens), True for a token
    that lies on a digit.
    """
    weight = torch.from_numpy(rng.rand(*on_digit.shape)) + bias * on_digit.cpu()
    return weight.topk(count, 1).indices.sort(1).values


def strided_tokens(scenes: int, count: int, start: float = 0.5, total: int = VISUAL_TOKENS) -> torch.Tensor:
    """Every n-th of `total` visual tokens, (scenes, count). start: 0..1, the place in the first stride."""
    row = ((np.arange(count) + start) * total / max(count, 1)).astype(np.int64)
    return torch.from_numpy(row).expand(scenes, -1)


@torch.no_grad()
def diverse_tokens(visual: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy max-min cosine distance, ascending (scenes, count): a check that a spread of tokens is enough."""
    unit = F.normalize(visual, dim=-1)
    distance = 1 - unit @ unit.mT
    scenes = torch.arange(len(visual))
    chosen = [distance.sum(-1).argmax(-1)]
    nearest = distance[scenes, chosen[0]]
    while len(chosen) < count:
        nearest[scenes, chosen[-1]] = -1
        chosen.append(nearest.argmax(-1))
        nearest = nearest.minimum(distance[scenes, chosen[-1]])
    return torch.stack(chosen, 1).sort(1).values
