# SPDX-License-Identifier: Apache-2.0
"""The images and videos of one forward call: where their tokens stand, and which encoded ones they are."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.devices import send
from vtprune.errors import UnsupportedStageError
from vtprune.stages.encoder_call import EncoderCall
from vtprune.tokens import Grid


@dataclass(frozen=True)
class Media:
    """Where the visual tokens of a call stand, on the CPU. An *image* here is an image or a video, with all its crops.

    Encoded tokens, and encoded media, are numbered through: all images of the call in the order of the prompts, then
    all videos. Where several samples share their images (beams), every copy has crops and images of its own.
    """

    labels: Tensor
    """(batch, length) long: crop of each visual column; -1 for separators and all other columns."""
    images: Tensor
    """(batch, length) long: image of each visual column, separators included; -1 elsewhere."""
    lines: Tensor
    """(batch, length) long: the separator that ends each visual column's line, -1 without one."""
    tokens: Tensor
    """(batch, length) long: each visual column's number among the encoded tokens; 0 elsewhere."""
    crop_rows: Tensor
    """(crops,) long: the sample of each crop."""
    crop_images: Tensor
    """(crops,) long: the image of each crop."""
    crop_media: Tensor
    """(crops,) long: the encoded medium of each crop."""
    crop_ranks: Tensor
    """(crops,) long: number of each crop within its medium."""
    grids: tuple[Grid | None, ...]
    """One a crop."""
    kinds: tuple[str, ...]
    """"image" or "video", one an image."""
    image_rows: Tensor
    """(images,) long: the sample of each image."""
    image_media: Tensor
    """(images,) long: the (first) encoded medium of each image."""
    encodings: tuple[EncoderCall, ...]
    copies: int
    """How many consecutive samples share their images (beams, several returned sequences)."""

    @property
    def visual(self) -> Tensor:
        """(batch, length) bool."""
        return self.images >= 0

    @property
    def crops_per_sample(self) -> Tensor:
        """(batch,) long."""
        return torch.bincount(self.crop_rows, minlength=len(self.labels))

    @classmethod
    def find(cls, visual: Sequence[Tensor], encodings: Sequence[EncoderCall], tiles_adjoin: bool) -> Media:
        """Place encodings at the visual columns, (batch, length) bool each, of their kinds.

        tiles_adjoin: media side by side in a prompt are tiles of one image.
        Raises UnsupportedStageError if the columns do not hold the encoded media.
        """
        found = {_copies(columns, encoding) for columns, encoding in zip(visual, encodings, strict=True)} - {None}
        if len(found) > 1:
            raise UnsupportedStageError("the images and the videos of this call belong to different numbers of samples")
        copies = found.pop() if found else 1
        tokens = torch.zeros_like(visual[0], dtype=torch.long)
        tables = _Tables()
        for columns, encoding in zip(visual, encodings, strict=True):
            counts = columns.sum(1)[::copies]
            starts = (counts.cumsum(0) - counts + tables.size).repeat_interleave(copies)
            tokens = torch.where(columns, starts[:, None] + columns.cumsum(1) - 1, tokens)
            tables.add(encoding, counts)
        anywhere = functools.reduce(torch.logical_or, visual)
        crops, media, lines, crop_media, crop_ranks, media_rows = tables.joined()

        first = torch.ones_like(media_rows, dtype=torch.bool)
        if tiles_adjoin:
            first[media[tokens[_starts_beside_another(anywhere, media[tokens])]]] = False
        media_images = first.cumsum(0) - 1
        image_rows = media_rows[first]

        copy = torch.arange(len(anywhere))[:, None] % copies

        def numbered(table: Tensor, size: int) -> Tensor:
            values = table[tokens] if len(table) else torch.full_like(tokens, -1)
            return torch.where(anywhere & (values >= 0), values + copy * size, -1)

        turns = torch.arange(copies)
        crop_images = media_images[crop_media]
        return cls(
            labels=numbered(crops, len(crop_media)),
            images=numbered(media_images[media], len(image_rows)),
            lines=numbered(lines, tables.separators),
            tokens=tokens,
            crop_rows=(image_rows[crop_images] * copies + turns[:, None]).flatten(),
            crop_images=(crop_images + turns[:, None] * len(image_rows)).flatten(),
            crop_media=crop_media.repeat(copies),
            crop_ranks=crop_ranks.repeat(copies),
            grids=tuple(tables.grids) * copies,
            kinds=tuple(kind for kind, begins in zip(tables.kinds, first.tolist(), strict=True) if begins) * copies,
            image_rows=(image_rows * copies + turns[:, None]).flatten(),
            image_media=first.nonzero().flatten().repeat(copies),
            encodings=tuple(encodings),
            copies=copies,
        )

    def holds(self, embeddings: Tensor) -> Tensor:
        """() bool: whether embeddings (batch, length, dim) have the encoded features at the visual columns."""
        features = torch.cat([encoding.features.to(embeddings) for encoding in self.encodings])
        rows, columns = self.visual.nonzero(as_tuple=True)
        places = (self.tokens[rows, columns], rows, columns)
        tokens, rows, columns = (send(place, embeddings.device) for place in places)
        return (features[tokens] == embeddings[rows, columns]).all()


class _Tables:
    """What is known of every encoded token, crop and medium, gathered one encoding after another."""

    def __init__(self):
        self.size = self.crops = self.separators = 0
        self.media = 0
        self.grids: list[Grid | None] = []
        self.kinds: list[str] = []
        self._columns: list[list[Tensor]] = [[] for _ in range(6)]

    def add(self, encoding: EncoderCall, counts: Tensor) -> None:
        """counts (samples,) long: the encoding's tokens in each sample's prompt."""
        lengths = torch.tensor([len(medium) for medium in encoding.media], dtype=torch.long)
        ends = counts.cumsum(0)
        starts = lengths.cumsum(0) - lengths
        if not torch.isin(ends, torch.cat([starts, lengths.sum()[None]])).all():
            raise UnsupportedStageError(
                f"the prompts hold {counts.tolist()} {encoding.kind} tokens (one count a sample), which do not end "
                f"where the encoded {encoding.kind}s, of {lengths.tolist()} tokens, do; pass whole prompts together "
                "with the images they are about"
            )
        media_rows = torch.searchsorted(ends, starts, right=True)
        for medium in encoding.media:
            count = len(medium.grids)
            lines = torch.full_like(medium.crops, -1) if medium.lines is None else medium.lines.cpu()
            crops = medium.crops.cpu()
            row = (
                torch.where(crops >= 0, crops + self.crops, -1),
                torch.full_like(crops, self.media),
                torch.where(lines >= 0, lines + self.separators, -1),
                torch.full((count,), self.media),
                torch.arange(count),
            )
            for column, values in zip(self._columns, row, strict=False):
                column.append(values)
            self.crops += count
            self.separators += int(lines.max()) + 1 if len(lines) else 0
            self.media += 1
            self.grids += medium.grids
            self.kinds.append(encoding.kind)
        self._columns[5].append(media_rows)
        self.size += int(lengths.sum())

    def joined(self) -> list[Tensor]:
        """Of every token: crop, medium, line; of every crop: medium, number in it; of every medium: its sample."""
        return [torch.cat(column) if column else torch.empty(0, dtype=torch.long) for column in self._columns]


def _copies(columns: Tensor, encoding: EncoderCall) -> int | None:
    """How many consecutive samples hold the same media; None if there are no tokens to tell by."""
    total, encoded = int(columns.sum()), encoding.tokens
    if not total and not encoded:
        return None
    counts = columns.sum(1)
    copies = total // encoded if encoded else 0
    fits = copies and total == encoded * copies and len(counts) % copies == 0
    if not fits or bool((counts.view(-1, copies) != counts[::copies, None]).any()):
        raise UnsupportedStageError(
            f"{encoded} {encoding.kind} tokens were encoded, but the prompts of this call hold {counts.tolist()} (one "
            "count a sample); pass whole prompts together with the images they are about (chunked prefill cannot be "
            "pruned)"
        )
    return copies


def _starts_beside_another(visual: Tensor, media: Tensor) -> Tensor:
    """(batch, length) bool: columns where a medium starts right behind another one's last token."""
    begins = torch.zeros_like(visual)
    begins[:, 1:] = visual[:, 1:] & visual[:, :-1] & (media[:, 1:] != media[:, :-1])
    return begins
