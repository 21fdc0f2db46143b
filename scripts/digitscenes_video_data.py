# SPDX-License-Identifier: Apache-2.0
"""Training data of `train_digitscenes_video.py`: clips with labels, packed prompts, and choices of visual tokens."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from digitscenes_data import COLOUR_NAMES, Block, Data, patch_owners
from PIL import Image

from vtprune.eval.digitscenes.clip_questions import THIRDS, VIDEO_FAMILIES, ask
from vtprune.eval.digitscenes.clips import DIRECTIONS, FRAME_SIZE, TICKS, Actor, Clip, draw_clip, third_of
from vtprune.eval.digitscenes.model import PATCH_SIZE
from vtprune.eval.digitscenes.scenes import digit_images
from vtprune.eval.digitscenes.video_model import FRAME_GRID, FRAME_TOKENS, FRAMES

STORED = 24
"""Number of frames drawn of a training clip; a step shows the model a part of them."""

MAX_ACTORS = 5
CLEAR_WAY = 12  # pixels; the direction is asked about if the digit has moved so far
SLOW = 50  # pixels in a clip: a digit that moves is at least this fast

_FIELDS = ("value", "colour", "size", "x", "y", "dx", "dy")


def draw_training_clip(seed: int, number: int, split: str) -> Clip:
    """Families alternate, as in the test set. In training the digits are bent, because there are only 1,300 images."""
    families, rng = list(VIDEO_FAMILIES), np.random.RandomState([seed, number])
    clip = draw_clip(rng, split, families[number % len(families)])
    return replace(clip, inks=tuple(bent(rng, ink) for ink in clip.inks)) if split == "train" else clip


def bent(rng, ink: np.ndarray) -> np.ndarray:
    """The ink, (size, size), a little turned, sheared, scaled, moved, and thinned or thickened."""
    turn, shear, middle = rng.uniform(-0.25, 0.25), rng.uniform(-0.2, 0.2), len(ink) / 2
    wide, high = rng.uniform(0.95, 1.25, 2)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    matrix = rotation @ np.array([[wide, shear], [0, high]])  # from the new place to the old one
    offset = middle + rng.uniform(-1, 1, 2) - matrix @ [middle, middle]
    flat = [*matrix[0], offset[0], *matrix[1], offset[1]]
    image = Image.fromarray(ink.astype(np.uint8)).transform(ink.shape, Image.Transform.AFFINE, flat, Image.BICUBIC)
    return np.minimum(np.asarray(image) * rng.uniform(0.8, 1.3), 255).astype(np.int32)


def draw_frames(count: int, split: str, seed: int) -> Data:
    """Single frames for the encoder, four of each clip, with the labels that `EncoderHeads` needs, except the bag."""
    pixels, owners, actors, places = [], [], [], []
    for number in range(count // 4):
        clip = draw_training_clip(seed, number, split)
        chosen = np.random.RandomState([seed, number, 1]).permutation(STORED)[:4]
        pixels.append(clip.frames(STORED)[chosen].transpose(0, 3, 1, 2))
        owners.append(patch_owners(clip.masks(STORED)[chosen], PATCH_SIZE, 12))
        actors += [clip.actors] * 4
        places += chosen.tolist()
    images = digit_images(split)
    first = np.cumsum([0, *map(len, images)])
    owner = np.concatenate(owners)
    digit, colour, source = np.zeros((3, *owner.shape), np.int64)
    centre = np.zeros((*owner.shape, 2), np.float32)
    for n, (cast, place) in enumerate(zip(actors, places, strict=True)):
        for i, actor in enumerate(cast):
            on = owner[n] == i + 1
            if on.any():
                digit[n, on], colour[n, on] = actor.value + 1, COLOUR_NAMES.index(actor.colour) + 1
                source[n, on] = first[actor.value] + actor.image
                rows, columns = actor.box(place, STORED)
                centre[n, on] = (
                    (columns.start + actor.size / 2) / FRAME_SIZE,
                    (rows.start + actor.size / 2) / FRAME_SIZE,
                )
    table = np.concatenate([np.stack(of_value) for of_value in images]).reshape(-1, 64).astype(np.float32) / 255
    arrays = np.concatenate(pixels), digit, colour, centre, source, np.zeros((len(owner), 0), np.float32), table
    return Data(actors, *map(torch.from_numpy, arrays))


@dataclass
class ClipData:
    """Clips of one split; tensors have one row for each clip.

    actors: of each clip. owner: uint8 (clips, STORED, 16), the actor (`i + 1`, 0 for none) under a visual token.
    table: (clips, MAX_ACTORS + 1, 7), `_FIELDS` of each actor behind a row of zeros; value and colour counted from 1.
    """

    actors: list[tuple[Actor, ...]]
    owner: torch.Tensor
    table: torch.Tensor

    @classmethod
    def of(cls, clips: list[Clip]) -> "ClipData":
        owner = [patch_owners(clip.masks(STORED), 2 * PATCH_SIZE, 30) for clip in clips]
        table = np.zeros((len(clips), MAX_ACTORS + 1, len(_FIELDS)), np.int64)
        for n, clip in enumerate(clips):
            for i, actor in enumerate(clip.actors):
                number = dict(vars(actor), value=actor.value + 1, colour=COLOUR_NAMES.index(actor.colour) + 1)
                table[n, i + 1] = [number[name] for name in _FIELDS]
        return cls([clip.actors for clip in clips], torch.from_numpy(np.stack(owner)), torch.from_numpy(table))

    def labels(self, rows: torch.Tensor, frames: torch.Tensor) -> "Labels":
        """Labels of the visual tokens of `frames` (numbers among STORED) of clips `rows`."""
        owner = self.owner[rows][:, frames].long().flatten(1)  # (rows, tokens)
        tokens = owner.shape[1]
        frame = frames.repeat_interleave(FRAME_TOKENS).expand_as(owner)
        under = self.table[rows].gather(1, owner[..., None].expand(-1, -1, len(_FIELDS))).unbind(-1)
        value, colour, size, x, y, dx, dy = under
        centre = torch.stack([x + dx * frame // STORED + size // 2, y + dy * frame // STORED + size // 2], -1)

        is_actor = owner[:, None] == torch.arange(1, MAX_ACTORS + 1)[:, None]  # (rows, actors, tokens)
        first = torch.where(is_actor, torch.arange(tokens), tokens).amin(-1)  # where it is seen first
        before = (first[:, None] < first[:, :, None]).sum(-1)  # how many others were seen earlier
        mine = (owner - 1).clamp(min=0)
        rank = before.gather(1, mine)
        since = frame - frames[(first.clamp(max=tokens - 1) // FRAME_TOKENS)].gather(1, mine)
        away = torch.maximum(dx.abs(), dy.abs())
        clear = since * away.clamp(min=SLOW) >= CLEAR_WAY * STORED
        direction = torch.zeros_like(owner)
        for number, (step_x, step_y) in enumerate(DIRECTIONS.values()):
            direction[(dx.sign() == step_x) & (dy.sign() == step_y) & (away > 0)] = number + 1
        time = (torch.arange(tokens) // FRAME_TOKENS).clamp(max=FRAMES - 1).expand_as(owner)
        grid = centre * FRAME_GRID // FRAME_SIZE
        return Labels(value, colour, grid, time, rank, torch.where(clear, direction, -1), first)


@dataclass
class Labels:
    """Labels of visual tokens, (clips, tokens); they have no meaning where `digit` is 0.

    digit and colour: 0 is background. centre: (clips, tokens, 2), column and row of the patch in which the digit's
    centre lies. time: which of the frames it is, the twelfth also for later ones. rank: how many other digits were seen
    before this one. direction: 0 stays, 1 to 4 as `DIRECTIONS`, -1 too early to tell. first: (clips, MAX_ACTORS), the
    token where an actor is seen first.
    """

    digit: torch.Tensor
    colour: torch.Tensor
    centre: torch.Tensor
    time: torch.Tensor
    rank: torch.Tensor
    direction: torch.Tensor
    first: torch.Tensor


def clip_caption_blocks(rng, actors: tuple[Actor, ...], first: list[int]) -> list[Block]:
    """Lists of what a clip holds: both pairings, what moves where, what is seen when (in which third alone, from which
    on, up to which), and the order of appearance.

    first: when an actor is seen first; any numbers.
    """
    shuffled = [actors[i] for i in rng.permutation(len(actors))]
    pairs: dict[str, list[tuple[str, str]]] = {
        "list colour digit": [(actor.colour, str(actor.value)) for actor in shuffled],
        "list digit colour": [(str(actor.value), actor.colour) for actor in shuffled],
        "list digit moves": [],
        "list moves digit": [],
        "list moves colour": [],
        "list digit seen": [],
        "list digit start": [(str(actor.value), THIRDS[actor.start * 3 // TICKS]) for actor in shuffled],
        "list digit end": [(str(actor.value), THIRDS[(actor.end - 1) * 3 // TICKS]) for actor in shuffled],
    }
    for actor in shuffled:
        always = (actor.start, actor.end) == (0, TICKS)
        if always or not actor.direction:
            pairs["list digit moves"].append((str(actor.value), actor.direction or "still"))
        if always and actor.direction:
            pairs["list moves digit"].append((actor.direction, str(actor.value)))
            pairs["list moves colour"].append((actor.direction, actor.colour))
        if always or third_of(actor.start, actor.end) is not None:
            when = "always" if always else THIRDS[third_of(actor.start, actor.end)]
            pairs["list digit seen"].append((str(actor.value), when))
    blocks = [
        Block.make(prompt, [word for pair in answer for word in pair], prompt.removeprefix("list "), every=2)
        for prompt, answer in pairs.items()
        if answer
    ]
    order = sorted(range(len(actors)), key=lambda i: first[i])
    return [*blocks, Block.make("list appears first", [str(actors[i].value) for i in order], "appears")]


def clip_question_blocks(rng, actors: tuple[Actor, ...], times: dict[str, int]) -> list[Block]:
    """Different questions about a clip; times: number of tries for a family."""
    asked = {}
    for family, tries in times.items():
        for _ in range(tries):
            if question := ask(rng, actors, family):
                asked[question.text] = question
    return [Block.make(question.text, [question.answer], question.family) for question in asked.values()]
