# SPDX-License-Identifier: Apache-2.0
"""One forward call of the language model under a session: what came in, where it was cut, what each layer sees."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vtprune.adapters.base import Adapter
from vtprune.cache import CacheLayout, Owner, pruned_layers, wrap_cache
from vtprune.errors import UnsupportedStageError
from vtprune.layout import Groups, Segment, take_columns
from vtprune.tokens import Grid, Selection


@dataclass(frozen=True)
class Images:
    """The images of a call: where each stands and which encoded image it is."""

    labels: Tensor
    """(batch, length) long: image number of each visual column, -1 elsewhere."""
    slots: Tensor
    """(batch, length) long: place of each visual column in its image."""
    rows: Tensor
    """(images,) long: the sample of each image."""
    encoded: Tensor
    """(images,) long: its number in the encoder's batch (beams share one)."""
    grids: tuple[Grid | None, ...]
    copies: int
    """How many consecutive samples share their images (beams, several returned sequences)."""

    @property
    def per_sample(self) -> Tensor:
        """(batch,) long: number of images of each sample."""
        return torch.bincount(self.rows, minlength=len(self.labels))

    @classmethod
    def find(cls, visual: Tensor, adapter: Adapter, encoded: int, tokens: int | None) -> Images:
        """visual (batch, length) bool; `encoded` images of `tokens` tokens were seen by the encoder (None: unseen)."""
        tokens = tokens or adapter.tokens_per_image
        counts = visual.sum(1)
        if bool((counts % tokens).any()):
            raise UnsupportedStageError(
                f"a prompt carries {counts.tolist()} visual tokens (one count a sample), which is no multiple of the "
                f"{tokens} tokens of an image; chunked prefill cannot be pruned: pass the whole prompt at once"
            )
        per_sample = counts // tokens
        total = int(per_sample.sum())
        copies = max(total // encoded, 1) if encoded else 1
        grouped = per_sample.view(-1, copies) if len(per_sample) % copies == 0 else None
        if encoded and (total != encoded * copies or grouped is None or bool((grouped != grouped[:, :1]).any())):
            raise UnsupportedStageError(
                f"{encoded} images were encoded, but the prompts of this call hold {total}; "
                "pass the prompts together with the images they are about"
            )
        rank = visual.cumsum(1) - 1
        first = (per_sample.cumsum(0) - per_sample)[:, None]
        labels = torch.where(visual, rank // tokens + first, -1)
        slots = torch.where(visual, rank % tokens, 0)
        rows = torch.repeat_interleave(torch.arange(len(visual), device=visual.device), per_sample)
        within = torch.arange(total, device=visual.device) - first[rows, 0]
        distinct = per_sample[::copies]
        base = (distinct.cumsum(0) - distinct).repeat_interleave(copies)
        return cls(labels, slots, rows, base[rows] + within, (adapter.grid(tokens),) * total, copies)


@dataclass
class Call:
    """State of one forward call that carries visual tokens, or continues a pruned cache."""

    adapter: Adapter
    owner: Owner
    batch: int
    length: int
    past: int
    """Logical length of the cache when the call began."""
    cache: Cache | None
    real: Tensor
    """(batch, length) bool, before any cut."""
    positions: Tensor
    """(..., batch | 1, length): position ids that came in."""
    images: Images | None
    """None if the call carries no visual tokens."""
    ids: Tensor | None
    """(batch, length) input ids; None if the caller gave embeddings."""
    embeddings: Tensor
    """(batch, length, dim): what came in, visual features in place."""
    past_real: Tensor | None
    """(batch, past) bool: padding already in a cache that was never pruned; None if there is none."""
    unpadded: bool
    """Whether `real` is known to be all True; asking a tensor would make an accelerator wait at every step."""
    whole: Segment = field(init=False)
    """The layout before any cut."""
    segments: list[Segment] = field(init=False)
    starts: list[int] = field(init=False)
    """First decoder layer of each segment."""
    before: list[tuple[CacheLayout, int]] = field(init=False)
    """Layout and physical length of every cache layer when the call began."""
    wrapped: bool = field(init=False)
    """Whether the cache layers are ours."""
    memo: dict = field(default_factory=dict)
    """Masks and rotary embeddings already built, by `key`."""

    def __post_init__(self):
        labels = self.images.labels if self.images else torch.full_like(self.real, -1, dtype=torch.long)
        self.whole = Segment.whole(self.real, labels)
        self.segments, self.starts = [self.whole], [0]
        layers = pruned_layers(self.cache)
        self.wrapped = bool(layers)
        if self.wrapped:
            self.before = [(layer.layout, layer.physical) for layer in layers]
            self.announce(0)
        else:
            self.before = [(CacheLayout(real=self.past_real), self.past)] * len(self.adapter.decoder_layers)

    @property
    def segment(self) -> Segment:
        """The layout after the last cut so far."""
        return self.segments[-1]

    @property
    def pruned(self) -> bool:
        """Whether this call has dropped anything so far."""
        # Not by length: the longest sample of a batch may have lost nothing.
        return self.segment is not self.whole

    def segment_at(self, layer: int) -> Segment:
        return self.segments[bisect_right(self.starts, layer) - 1]

    def key(self, layer: int) -> tuple[int, int, int]:
        """Layers with equal keys see the same columns at the same positions through the same mask."""
        layout, physical = self.before[layer]
        return id(self.segment_at(layer)), id(layout), physical

    # -- groups -------------------------------------------------------------------------------------------------

    def image_groups(self) -> Groups:
        """One group an image, over the visual tokens alive."""
        return Groups.of_labels(self.segment.images, self.images.rows)

    def sample_groups(self) -> Groups:
        """One group a sample, over the visual tokens alive."""
        rows = torch.arange(self.batch, device=self.real.device)
        return Groups.of_labels(torch.where(self.segment.visual, rows[:, None], -1), rows)

    def slots(self) -> Tensor:
        """(batch, n): place in its image of every current column."""
        return take_columns(self.images.slots, self.segment.columns)

    def prompt_key(self, row: int) -> int:
        """A number that depends on the text of one sample's prompt alone."""
        if self.ids is None:
            return 0
        text = self.ids[row][(self.real[row] & (self.images.labels[row] < 0)).to(self.ids.device)]
        return zlib.crc32(str(text.tolist()).encode())

    # -- cutting ------------------------------------------------------------------------------------------------

    def apply(
        self, hidden: Tensor, groups: Groups, selection: Selection, layer: int, compact: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Drop what a selection leaves out, on the input (batch, n, dim) of a decoder layer.

        Returns the shorter input and the indices (batch, m) of its columns; None if everything survives.
        """
        segment = self.segment
        dropped = groups.valid & ~selection.keep.to(groups.valid.device)
        if not bool(dropped.any()):
            return None
        if selection.features is not None:
            kept = selection.keep[..., None].to(hidden.device)
            hidden = groups.scatter(torch.where(kept, selection.features.to(hidden), groups.gather(hidden)), hidden)
        keep = groups.scatter(selection.keep.to(groups.valid.device) & groups.valid, segment.real)
        fate = segment.fates_after(groups, selection, keep)
        after, index = segment.cut(keep, fate, compact=compact, whole_real=self.real)
        hidden = take_columns(hidden, index)
        # A masked key still multiplies its value by zero, and 0 * NaN is NaN.
        hidden = hidden.masked_fill(~after.real.to(hidden.device)[..., None], 0)
        if self.starts[-1] == layer:
            self.segments[-1] = after
        else:
            self.segments.append(after)
            self.starts.append(layer)
        self.memo.clear()
        self.announce(layer)
        return hidden, index

    def announce(self, first_layer: int) -> None:
        """Tell the cache layers from `first_layer` on (all of them, if never wrapped) what is about to arrive."""
        if self.cache is None:
            return
        if not self.wrapped:
            wrap_cache(self.cache, self.owner, len(self.adapter.decoder_layers))
            self.wrapped, first_layer = True, 0
        memo = {}
        for i in range(first_layer, len(self.cache.layers)):
            key = self.key(i)
            if key not in memo:
                layout, physical = self.before[i]
                segment = self.segment_at(i)
                plain = self.unpadded and segment is self.whole
                padding, shift = (None, None) if plain else (segment.padding(), self._shift(segment))
                memo[key] = layout.extend(segment.columns.shape[1], padding, segment.dropped, shift, physical)
            self.cache.layers[i].layout = memo[key]

    def _shift(self, segment: Segment) -> Tensor | None:
        """(batch, 1) positions that tokens to come must be moved back by; None for none."""
        shift = segment.end_lag
        # Callers count on from the last column's position; after right padding that is not the last token's.
        last = self.length - 1 - self.real.flip(1).to(torch.uint8).argmax(1)
        if bool((last < self.length - 1).any()):
            positions = self._expanded_positions()
            while positions.ndim > 2:
                positions = positions[0]
            shift = shift + positions[:, -1:] - positions.gather(1, last[:, None].to(positions.device))
        return shift if bool(shift.any()) else None

    # -- what a layer sees --------------------------------------------------------------------------------------

    def _expanded_positions(self) -> Tensor:
        return self.positions.expand(*self.positions.shape[:-2], self.batch, -1)

    def positions_at(self, layer: int) -> Tensor:
        """(..., batch, n): position ids in force at a layer."""
        segment, shift = self.segment_at(layer), self.before[layer][0].shift
        positions = self._expanded_positions()
        columns = segment.columns.to(positions.device)
        positions = positions.gather(-1, columns.expand(*positions.shape[:-2], *columns.shape))
        lag = segment.lag if shift is None else segment.lag + shift.to(segment.lag.device)
        return (positions - lag.to(positions.device)).clamp(min=0)

    def rope_at(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of a layer's positions."""
        key = ("rope", self.key(layer))
        if key not in self.memo:
            self.memo[key] = self.adapter.language_model.rotary_emb(hidden, self.positions_at(layer).to(hidden.device))
        return self.memo[key]

    def padding_mask(self, layer: int) -> Tensor | None:
        """2D mask of a layer, logical length; None if all its columns are real and a cache knows the lengths."""
        if self.cache is None:
            return self.segment_at(layer).real
        return self.cache.layers[layer].layout.mask()

    def mask_at(self, layer: int, hidden: Tensor):
        """Attention mask of a layer in the form its attention back end wants, from transformers' own factory."""
        # Importing this takes seconds (it pulls in the compiler) and any loaded model has done it already.
        from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING

        config = self.adapter.language_model.config
        types = getattr(config, "layer_types", None)
        kind = types[layer] if types else "full_attention"
        key = ("mask", kind, self.key(layer))
        if key not in self.memo:
            self.memo[key] = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind](
                config=config,
                inputs_embeds=hidden,
                attention_mask=self.padding_mask(layer),
                past_key_values=self.cache,
                layer_idx=layer,
            )
        return self.memo[key]
