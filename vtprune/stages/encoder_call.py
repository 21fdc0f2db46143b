# SPDX-License-Identifier: Apache-2.0
"""What is recorded of one run of the vision encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtprune.adapters.base import PIXELS
from vtprune.devices import read
from vtprune.errors import UnsupportedStageError
from vtprune.stages.in_encoder import EncoderMerge
from vtprune.tokens import Medium


@dataclass
class EncoderCall:
    """What one call of the base model's `get_image_features` or `get_video_features` took and gave."""

    kind: str
    inputs: Mapping[str, Any] | None
    """The call's arguments by name; None if it was not seen."""
    output: Any = None
    """The object it returned."""
    pooled: Tensor | Sequence[Tensor] = ()
    """The projected features in it, as they were then: `generate()` repeats them in place for beams."""
    media: list[Medium] = field(default_factory=list)
    """The layout of each image or video, in order."""
    projector_input: Tensor | None = None
    """The projector's input; as rows if it was called several times; only if asked for."""
    rows: dict[int, Tensor] = field(default_factory=dict)
    """Encoder layer -> (crops, heads, tokens), the CLS query's attention; only for the layers asked for."""
    received: dict[int, Tensor] = field(default_factory=dict)
    """Encoder layer -> (crops, tokens), the mean attention each token receives; only for the layers asked for."""
    keys: dict[int, Tensor] = field(default_factory=dict)
    """Encoder layer -> (crops, tokens, heads, head dim), not rotated; only for the layers asked for."""
    merge: EncoderMerge | None = None
    """What was merged inside the encoder; None if nothing was to be."""
    outputs: dict[int, Tensor] = field(default_factory=dict)
    """Encoder layer -> (crops, tokens, dim), what it put out; only for the layers asked for."""
    placed: Tensor | None = None
    """(encoded tokens,) bool: those that the model puts into the prompt; `media` and `features` have these alone. None
    for all."""
    seconds: float = 0.0
    selection_flops: int = 0
    """FLOPs of the choices inside the encoder; only if they are counted."""

    def project(self, features: Tensor) -> None:
        """Take down the input of one call of the projector."""
        if self.projector_input is not None:
            features = torch.cat([self.projector_input.flatten(0, -2), features.flatten(0, -2)])
        self.projector_input = features

    @property
    def features(self) -> Tensor:
        """(tokens of all media, dim): what goes to the language model."""
        pooled = self.pooled
        rows = pooled.flatten(0, -2) if torch.is_tensor(pooled) else torch.cat([f.flatten(0, -2) for f in pooled])
        return self.in_prompt(rows)

    @property
    def tokens(self) -> int:
        """Visual tokens of all media."""
        return sum(map(len, self.media))

    @property
    def encoded_tokens(self) -> int:
        """Those that the model leaves out of the prompt included."""
        return self.tokens if self.placed is None else len(self.placed)

    def place(self, media: list[Medium], placed: Tensor | None) -> None:
        """Note the layout of all encoded media, and which of their tokens the model puts into the prompt.

        Raises UnsupportedStageError if that is said of another number of tokens.
        """
        self.placed = placed
        if placed is None:
            self.media = media
            return
        lengths = [len(medium) for medium in media]
        if sum(lengths) != len(placed):
            raise UnsupportedStageError(
                f"{sum(lengths)} {self.kind} tokens were encoded, but the call says of {len(placed)} which are in the "
                "prompt, as it does for beams and several answers; ask for one answer without beams"
            )
        parts = placed.cpu().split(lengths)
        self.media = [medium.only(kept) for medium, kept in zip(media, parts, strict=True)]

    def part(self, counts: Tensor) -> None:
        """Take images that came as one, without grids, for one a prompt. counts (samples,) long: their tokens in each
        sample's prompt.
        """
        lengths = counts[counts > 0].tolist()
        if self.inputs is None or len(self.media) != 1 or len(lengths) < 2 or sum(lengths) != len(self.media[0]):
            return
        name = PIXELS[self.kind]
        self.media = [Medium.without_grid(length) for length in lengths]
        self.inputs = {**self.inputs, name: self.inputs[name].flatten(0, -2).split(lengths)}

    def in_prompt(self, rows: Tensor) -> Tensor:
        """Rows of all encoded tokens -> those of the tokens in the prompt."""
        return rows if self.placed is None else rows[self.placed.to(rows.device)]


def with_tables_read(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an encode call; tables of integers or flags, such as sizes, on the CPU, since adapters read them.

    There is one wait for all of them, which is short before the encoder runs.
    """
    tables = {
        name: value
        for name, value in arguments.items()
        if torch.is_tensor(value) and value.ndim <= 2 and not value.is_floating_point()
    }
    return {**arguments, **dict(zip(tables, read(*tables.values()), strict=True))}


def bit_sum(pixels: Tensor) -> Tensor:
    """() long: a number that depends on the pixels alone."""
    # A sum of bit patterns is exact: it does not depend on how a batch is laid out or a device adds up.
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[pixels.element_size()]
    return pixels.contiguous().view(bits).sum(dtype=torch.int64)
