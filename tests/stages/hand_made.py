# SPDX-License-Identifier: Apache-2.0
"""Prompts, encodings and calls made by hand for the tests of the stages, with numbers that can be followed.

A prompt is a string with a letter a column: `.` padding, `t` text, `<` a token around images, `i` a token of an image,
`v` one of a video.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig

import vtprune
from vtprune.stages.cache import Owner
from vtprune.stages.call import Call
from vtprune.stages.encoder_call import EncoderCall
from vtprune.stages.media import Media
from vtprune.tokens import Grid, Medium, ModelShape, Selection, VisualTokens

DEPTH = 4
"""Decoder layers."""
CONFIG = LlamaConfig(num_hidden_layers=DEPTH, hidden_size=8, num_attention_heads=2, vocab_size=100)
SHAPE = ModelShape(encoder_layers=3, decoder_layers=DEPTH, feature_layer=1, has_cls=True)
IDS = {".": 0, "<": 89, "i": 90, "v": 91}
"""Letter -> its id; text has the ids 10, 11, ... by its column."""


def adapter(**facts: Any) -> SimpleNamespace:
    """What a call asks of an adapter; facts: further ones, or others."""
    stated = dict(
        shape=SHAPE,
        decoder_layers=[None] * DEPTH,
        language_model=SimpleNamespace(config=CONFIG),
        text_config=CONFIG,
        visual_token_ids={"image": IDS["i"], "video": IDS["v"]},
        tiles_adjoin=False,
        images_joined=False,
        prompt_tokens=lambda kind, inputs: None,
        window_cuts_blocks=False,
        markers=lambda ids, images: torch.zeros_like(images, dtype=torch.bool) if ids is None else ids == IDS["<"],
        rope=lambda layer, hidden, positions: positions[..., None].float(),
        rope_kinds=["one"] * DEPTH,
        has_blocks=lambda layer: True,
        key_sources=list(range(DEPTH)),
        token_states=lambda hidden: hidden,
        layer_input=lambda states: states,
    )
    return SimpleNamespace(**stated | facts)


def encoding(*media: Medium, kind: str = "image", first: int = 1) -> EncoderCall:
    """One run of the encoder: visual tokens number `first`, `first` + 1, ..., with the features (number, -number)."""
    numbers = torch.arange(first, first + sum(map(len, media)), dtype=torch.float)
    pooled = tuple(torch.stack([numbers, -numbers], -1).split([len(medium) for medium in media]))
    output = SimpleNamespace(pooler_output=pooled, last_hidden_state=None)
    return EncoderCall(kind, {}, output, pooled, list(media))


def row_of(tokens: int) -> Medium:
    """An image of one crop, whose tokens stand in one row."""
    return Medium.of_grids(Grid(1, tokens))


def with_newlines(rows: int, columns: int) -> Medium:
    """An image of one crop with a separator after each row."""
    crops = torch.tensor(([0] * columns + [-1]) * rows)
    return Medium(crops, (Grid(rows, columns),), torch.arange(rows).repeat_interleave(columns + 1))


def columns_of(prompts: Sequence[str], letters: str) -> Tensor:
    """(batch, length) bool: the columns that hold one of the letters."""
    return torch.tensor([[letter in letters for letter in prompt] for prompt in prompts])


def ids_of(prompts: Sequence[str]) -> Tensor:
    """(batch, length) long."""
    return torch.tensor([[IDS.get(letter, 10 + c) for c, letter in enumerate(prompt)] for prompt in prompts])


def media_of(prompts: Sequence[str], *encodings: EncoderCall, tiles_adjoin: bool = False) -> Media:
    """Where the encodings stand in the prompts."""
    kinds = {"image": "i", "video": "v"}
    return Media.find([columns_of(prompts, kinds[e.kind]) for e in encodings], encodings, tiles_adjoin)


def call_of(*prompts: str, encodings: Sequence[EncoderCall], **fields: Any) -> Call:
    """A call that carries the prompts.

    Embeddings (batch, length, 2) are 0 for padding, (0.5, 0.5) for text, and the features of visual tokens.
    """
    real = ~columns_of(prompts, ".")
    media = media_of(prompts, *encodings)
    embeddings = torch.full((*real.shape, 2), 0.5) * real[..., None]
    features = torch.cat([e.features for e in encodings])
    embeddings[media.visual] = features[media.tokens[media.visual]]
    stated = dict(
        adapter=adapter(),
        owner=Owner(),
        batch=len(prompts),
        length=real.shape[1],
        past=0,
        cache=None,
        real=real,
        prompt=real,
        positions=(real.cumsum(1) - 1).clamp(min=0),
        media=media,
        ids=ids_of(prompts),
        embeddings=embeddings,
        blocks=None,
        masks_by_type=False,
        deepstack={},
        past_real=None,
    )
    return Call(**stated | fields)


def numbered(batch: int, length: int, first: int = 1) -> Tensor:
    """(batch, length, 1) float: `first`, `first` + 1, ... row by row."""
    return torch.arange(first, first + batch * length, dtype=torch.float).view(batch, length, 1)


def fill(cache: Cache, states: Tensor) -> None:
    """Let every layer of a cache take in the same keys, and the same values: states (batch, n, 8)."""
    for layer in range(DEPTH):
        keys = states.unflatten(-1, (2, 4)).transpose(1, 2)
        cache.update(keys, keys, layer)


def empty_cache() -> DynamicCache:
    return DynamicCache(config=CONFIG)


@dataclass(frozen=True, kw_only=True)
class Scripted:
    """Mixed into the class of a stage: a method that keeps what it is told, and remembers what it was shown."""

    signal: ClassVar[str] = "-"
    needs_budget: ClassVar[bool] = False

    keeps: tuple[Any, ...] = ()
    """For each choice, for each group: the places of the tokens that are kept. The last choice is repeated."""
    requests: tuple[Any, ...] = ()
    """Signals that it reads."""
    seen: list[Any] = field(default_factory=list, compare=False)
    """What it was shown at each choice."""
    read: list[Any] = field(default_factory=list, compare=False)
    """What the signals were at each choice, by signal."""

    def signals(self, shape: ModelShape) -> tuple[Any, ...]:
        return self.requests

    def select(self, tokens: VisualTokens) -> Selection:
        wanted = self.keeps[min(len(self.seen), len(self.keeps) - 1)]
        self.seen.append(tokens)
        self.read.append({request: tokens[request] for request in self.requests})
        return Selection.of_indices(tokens, [torch.tensor(places, dtype=torch.long) for places in wanted])


@dataclass(frozen=True, kw_only=True)
class ScriptedBefore(Scripted, vtprune.BeforeLLM):
    name: ClassVar[str] = "scripted_before"

    def budgets(self, lengths: Tensor, images: Tensor) -> Tensor:
        return torch.full_like(lengths, -1)


@dataclass(frozen=True, kw_only=True)
class ScriptedInside(Scripted, vtprune.InLLM):
    name: ClassVar[str] = "scripted_inside"

    layers: tuple[int, ...] = (2,)

    def cuts(self, shape: ModelShape) -> tuple[int, ...]:
        return self.layers

    def budgets(self, shape: ModelShape, entering: Tensor, crops: Tensor) -> Tensor:
        return torch.full((len(self.layers), len(entering)), -1)
