# SPDX-License-Identifier: Apache-2.0
"""The nouns a method speaks: `VisualTokens` goes in, `Selection` comes out. Nothing here knows a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtprune.devices import read, send


@dataclass(frozen=True)
class Grid:
    """Layout of one image: `prefix` tokens without a place (a CLS token), then `rows` x `cols` in raster order."""

    rows: int
    cols: int
    prefix: int = 0

    def __len__(self) -> int:
        return self.prefix + self.rows * self.cols


@dataclass(frozen=True)
class Medium:
    """Layout of one image or video: what each of its visual tokens, in the order of the prompt, stands for."""

    crops: Tensor
    """(tokens,) long: the crop, tile or frame of each token, numbered from 0 without gaps; -1 for separators, i.e.
    newline tokens, which are no content."""
    grids: tuple[Grid | None, ...]
    """One layout a crop; its tokens in raster order. None if it has no grid."""
    lines: Tensor | None = None
    """(tokens,) long: number of the separator that ends each token's line, a separator's own number, -1 without one. A
    separator goes when all the content of its line is gone, and one without a number when all of the image is. None:
    there are no separators."""

    def __len__(self) -> int:
        return len(self.crops)

    @classmethod
    def of_grids(cls, *grids: Grid) -> Medium:
        """Crops one after another, no separators."""
        lengths = torch.tensor([len(grid) for grid in grids])
        return cls(torch.arange(len(grids)).repeat_interleave(lengths), grids)

    def only(self, kept: Tensor) -> Medium:
        """The layout of the tokens `kept` (tokens,) bool, of one without separators; what lost tokens has no grid."""
        left = torch.bincount(self.crops[kept], minlength=len(self.grids)).tolist()
        _, crops = self.crops[kept].unique(return_inverse=True)
        whole = torch.bincount(self.crops, minlength=len(self.grids)).tolist()
        grids = [
            grid if some == every else None for grid, some, every in zip(self.grids, left, whole, strict=True) if some
        ]
        return Medium(crops, tuple(grids))

    @classmethod
    def without_grid(cls, tokens: int) -> Medium:
        """One crop of so many tokens whose places are unknown."""
        return cls(torch.zeros(tokens, dtype=torch.long), (None,))


@dataclass(frozen=True)
class ModelShape:
    """What a method may know of a model before it runs: depths and the encoder's make, never modules."""

    encoder_layers: int
    decoder_layers: int
    feature_layer: int
    """0-based index of the deepest encoder layer whose output the projector reads."""
    has_cls: bool


@dataclass(frozen=True)
class HostCopy:
    """What a method may branch on, on the CPU: to read it from an accelerator would be to wait for it."""

    lengths: Tensor
    """(groups,) long: number of real tokens of each group."""
    budget: Tensor
    """(groups,) long: see `VisualTokens`."""
    crops: Tensor | None = None
    """(groups, tokens) long: see `VisualTokens`."""

    def places(self, group: int) -> list[Tensor]:
        """For each crop of a group that has tokens, in order, their places in the group: (tokens of the crop,) long."""
        assert self.crops is not None
        crops = self.crops[group, : int(self.lengths[group])]
        order = crops.argsort(stable=True)
        return list(order.split(crops.unique(return_counts=True)[1].tolist()))


@dataclass(frozen=True)
class VisualTokens:
    """A padded batch of groups of visual tokens, as one method sees them at one stage.

    Before the LLM a group is one crop (an image, a tile or a frame: the adapter's layout says which) or, as the method
    wishes, one whole image or video; inside the LLM it is one sample, i.e. all visual tokens of a prompt together.
    Separators (newline tokens) are in no group.
    """

    features: Tensor
    """(groups, tokens, dim): projected features before the LLM, hidden states inside it and inside the vision encoder.
    Padding rows are zero."""
    valid: Tensor
    """(groups, tokens) bool: True for real tokens; padding, if any, stands at the end of a row."""
    budget: Tensor
    """(groups,) long: how many tokens of each group to keep; -1, in all groups, leaves it to the method."""
    signals: Mapping[Hashable, Any] | Callable[[Hashable], Any] = field(default_factory=dict)
    """What `tokens[request]` looks up: see `vtprune.signals` for the requests."""
    crops: Tensor | None = None
    """(groups, tokens) long: number of the crop (tile, frame) of each token within its group, -1 for padding. None
    inside the LLM."""
    layouts: tuple[tuple[Grid | None, ...], ...] = ()
    """For each group the layout of each of its crops; None where tokens of it are missing. Empty inside the LLM."""
    kinds: tuple[str, ...] = ()
    """For each group what it is of, "image" or "video". Empty inside the LLM."""
    runs: Tensor | None = None
    """(groups, tokens) long: number of the run of visual tokens, without text in it, that each token is in. None
    before the LLM."""
    shape: ModelShape | None = None
    layer: int | None = None
    """Decoder layer that will run next, or, inside the vision encoder, the layer that has run; None between them."""
    copy: HostCopy | None = None
    """Where the stage knows it; `host` is never None."""

    def __getitem__(self, request: Hashable) -> Any:
        """The signal asked for, e.g. `tokens[EncoderFeatures()]`; only what the method lists in `signals()`."""
        return self.signals(request) if callable(self.signals) else self.signals[request]

    @property
    def lengths(self) -> Tensor:
        """(groups,) long: number of real tokens of each group."""
        return self.valid.sum(1)

    @property
    def host(self) -> HostCopy:
        """Lengths, budget and crops on the CPU."""
        if self.copy is not None:
            return self.copy
        return HostCopy(self.lengths.cpu(), self.budget.cpu(), None if self.crops is None else self.crops.cpu())

    @property
    def grids(self) -> tuple[Grid | None, ...]:
        """One layout a group; None where it has several crops, or its tokens are no full grid."""
        return tuple(layout[0] if len(layout) == 1 else None for layout in self.layouts)

    def each(self) -> Iterator[tuple[int, int, int]]:
        """Yield `(group, length, k)` as ints, for methods that select one group at a time."""
        host = self.host
        yield from zip(range(len(self.valid)), host.lengths.tolist(), host.budget.tolist(), strict=True)


class Merging:
    """Collects a `Selection` for methods that merge one part of a group at a time."""

    def __init__(self, tokens: VisualTokens):
        self._keep, self._features = torch.zeros_like(tokens.valid), tokens.features.clone()
        self._sources = torch.full_like(tokens.valid, -1, dtype=torch.long)

    def put(self, group: int, places: Tensor | int, keep: Tensor, features: Tensor, sources: Tensor) -> None:
        """Note what is left of a part.

        Args:
            group: its group.
            places: (m,) long, the places of its tokens in the group; or an int, the first m of them.
            keep: (m,) bool.
            features: (m, dim); rows where `keep` is True count.
            sources: (m,) long: index in the part of the kept token that each token went into, -1 for dropped ones.
        """
        device = self._keep.device
        places = torch.arange(places, device=device) if isinstance(places, int) else send(places, device)
        self._keep[group, places], self._features[group, places] = keep, features
        self.send(group, places, torch.where(sources >= 0, places[sources], -1))

    def send(self, group: int, places: Tensor, targets: Tensor) -> None:
        """Note only where tokens at `places`, of any shape, went: places in the group, -1 for dropped."""
        self._sources[group, places] = targets

    @property
    def selection(self) -> Selection:
        """What was put; tokens of no part are dropped."""
        return Selection(self._keep, self._features, self._sources)


@dataclass(frozen=True)
class Selection:
    """Which tokens of a `VisualTokens` survive, and what was merged into them."""

    keep: Tensor
    """(groups, tokens) bool."""
    features: Tensor | None = None
    """(groups, tokens, dim) for merging methods: rows where `keep` is True replace the tokens' features."""
    sources: Tensor | None = None
    """(groups, tokens) long for merging methods: index in the group of the kept token that each token went into, -1 for
    dropped ones. None: kept tokens stand for themselves alone."""
    copies: list[Tensor] | None = field(default=None, repr=False, compare=False)
    """`keep`, and `sources` if there are any, on the CPU; None if they were not read yet."""

    def on_host(self) -> Selection:
        """`keep` and `sources` alone, on the CPU."""
        values = (self.keep,) if self.sources is None else (self.keep, self.sources)
        keep, *sources = read(*values) if self.copies is None else self.copies
        return Selection(keep, None, sources[0] if sources else None)

    @staticmethod
    def of_indices(tokens: VisualTokens, indices: list[Tensor]) -> Selection:
        """Selection from one LongTensor of kept indices a group."""
        keep = torch.zeros(tokens.valid.shape, dtype=torch.bool, device=indices[0].device if indices else None)
        for group, kept in enumerate(indices):
            keep[group, kept] = True
        return Selection(send(keep, tokens.valid.device))
