# SPDX-License-Identifier: Apache-2.0
"""One forward call of the language model under a session: what came in, where it was cut, what each layer sees."""

from __future__ import annotations

import functools
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtprune.adapters.base import Adapter
from vtprune.cache import CacheLayout, Owner, PrunedLayer, pruned_layers, wrap_cache
from vtprune.layout import Groups, Segment, counted_from, last_axis, take_columns
from vtprune.signals import Places
from vtprune.stages.media import Media
from vtprune.tokens import Selection
from vtprune.transformers_private import Cache, layer_mask, layer_type


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
    prompt: Tensor
    """(batch, length) bool: what of it is the prompt, and not an answer or guesses behind it. Choices are made by this
    alone, so that they are those of a prompt without anything behind it."""
    positions: Tensor
    """(..., batch | 1, length): position ids that came in."""
    media: Media | None
    """None if the call carries no visual tokens."""
    ids: Tensor | None
    """(batch, length) input ids; None if the caller gave embeddings."""
    embeddings: Tensor
    """(batch, length, dim): what came in, visual features in place."""
    blocks: Tensor | None
    """(batch, any length) long: see `Adapter.blocks`."""
    masks_by_type: bool
    """Whether the call came with a mapping from kinds of attention to masks."""
    planes: Sequence[Tensor]
    """One (visual tokens of the batch, dim) a decoder layer, which the model adds to its output (DeepStack)."""
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
    held: dict[int, Tensor] = field(default_factory=dict)
    """Decoder layer -> (batch, n) bool over the columns of its segment: visual tokens left in its cache after an
    eviction."""

    def __post_init__(self):
        visual = self.media.visual if self.media else torch.zeros_like(self.real)
        if self.blocks is not None:
            missing = max(self.past + self.length - self.blocks.shape[1], 0)
            here = slice(self.past, self.past + self.length)
            self.blocks = pad(self.blocks, (0, missing), value=-1)[:, here].to(self.real.device)
        self.whole = Segment.whole(self.real, visual, self.positions)
        self.segments, self.starts = [self.whole], [0]
        self.wrapped = bool(pruned_layers(self.cache))
        if self.wrapped:
            held = [self.cached(i) for i in range(len(self.adapter.decoder_layers))]
            self.before = [(layer.layout, layer.physical) for layer in held]
            self.announce(0)
        else:
            self.before = [(CacheLayout(real=self.past_real), self.past)] * len(self.adapter.decoder_layers)

    @property
    def segment(self) -> Segment:
        """The layout after the last cut so far."""
        return self.segments[-1]

    @functools.cached_property
    def text(self) -> Tensor:
        """(batch, length) bool: the prompt without visual tokens and what a processor puts around them."""
        images = self.media.images
        return self.prompt & ~self.media.visual & ~self.adapter.markers(self.ids, images).to(self.prompt.device)

    @property
    def pruned(self) -> bool:
        """Whether this call has dropped anything so far."""
        # Not by length: the longest sample of a batch may have lost nothing.
        return self.segment is not self.whole

    def prompt_at(self, segment: Segment) -> Tensor:
        """(batch, n) bool: the columns of a segment that are of the prompt."""
        return take_columns(self.prompt, segment.columns)

    def cached(self, layer: int) -> PrunedLayer:
        """What a wrapped cache holds of a decoder layer.

        A layer that carries a state instead has what all others have: where such layers are, nothing is cut between.
        """
        own = self.cache.layers[layer]
        return own if isinstance(own, PrunedLayer) else pruned_layers(self.cache)[0]

    def segment_at(self, layer: int) -> Segment:
        return self.segments[bisect_right(self.starts, layer) - 1]

    def key(self, layer: int) -> tuple[int, int, int]:
        """Layers with equal keys see the same columns at the same positions through the same mask."""
        layout, physical = self.before[layer]
        return id(self.segment_at(layer)), id(layout), physical

    # -- groups -------------------------------------------------------------------------------------------------

    def _alive(self, labels: Tensor, segment: Segment | None = None) -> Tensor:
        """Labels (batch, length) of a segment's columns, by default the current one's; -1 where no visual token is."""
        segment = segment or self.segment
        return take_columns(labels, segment.columns).masked_fill(~segment.visual, -1)

    def crop_labels(self, segment: Segment | None = None) -> Tensor:
        """(batch, n) long: the crop of each column, by default of the current ones; -1 for separators and text."""
        return self._alive(self.media.labels, segment)

    def crop_groups(self) -> Groups:
        """One group a crop, over the visual tokens alive."""
        return Groups.of_labels(self.crop_labels(), self.media.crop_rows, self.media.crop_images)

    def image_groups(self) -> Groups:
        """One group an image or video, over the visual tokens alive; separators are in none."""
        content = self.crop_labels() >= 0
        rows = self.media.image_rows
        images = torch.arange(len(rows), device=rows.device)
        return Groups.of_labels(self._alive(self.media.images).masked_fill(~content, -1), rows, images)

    def sample_groups(self, segment: Segment | None = None) -> Groups:
        """One group a sample, over the visual tokens alive, by default now; separators are in none."""
        rows = torch.arange(self.batch, device=self.real.device)
        content = self.crop_labels(segment) >= 0
        return Groups.of_labels(torch.where(content, rows[:, None], -1), rows, torch.full_like(rows, -1))

    def spans(self) -> Tensor:
        """(batch, n) long: for current visual columns the number of their stretch of visual columns in the sample."""
        visual = self.segment.visual
        begins = visual.clone()
        begins[:, 1:] &= ~visual[:, :-1]
        return begins.cumsum(1) - 1

    def encoded_tokens(self) -> Tensor:
        """(batch, n): number among the encoded tokens of every current column."""
        return take_columns(self.media.tokens, self.segment.columns)

    def prompt_key(self, row: int) -> int:
        """A number that depends on the text of one sample's prompt alone."""
        if self.ids is None:
            return 0
        text = self.ids[row][(self.prompt[row] & ~self.media.visual[row]).to(self.ids.device)]
        return zlib.crc32(str(text.tolist()).encode())

    # -- cutting ------------------------------------------------------------------------------------------------

    def apply(
        self,
        hidden: Tensor,
        groups: Groups,
        selection: Selection,
        layer: int,
        *,
        compact: bool,
        keep_separators: bool = False,
        masking: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """Drop what a selection leaves out, on the input (batch, n, dim) of a decoder layer.

        keep_separators: also those of lines of which nothing is kept. masking: drop by hiding it from that layer on,
            instead of taking it out.
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
        if not keep_separators:
            keep &= ~self.idle_separators(keep)
        fate = segment.fates_after(groups, selection, keep)
        if masking:
            index = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
            after = segment.hide(keep, fate)
        else:
            after, index = segment.cut(keep, fate, compact=compact)
            hidden = take_columns(hidden, index)
        # A masked key still multiplies its value by zero, and 0 * NaN is NaN.
        hidden = hidden.masked_fill(~after.present.to(hidden.device)[..., None], 0)
        if self.starts[-1] == layer:
            self.segments[-1] = after
        else:
            self.segments.append(after)
            self.starts.append(layer)
        self.memo.clear()
        self.announce(layer)
        return hidden, index

    def idle_separators(self, keep: Tensor, segment: Segment | None = None) -> Tensor:
        """(batch, n) bool: separators (newline tokens) of lines of which nothing is kept, by default of those now."""
        segment = segment or self.segment
        lines, content = self._alive(self.media.lines, segment), self.crop_labels(segment) >= 0
        separators = segment.visual & ~content
        if not bool(separators.any()):
            return separators
        ended = lines.new_zeros(int(lines.max()) + 1, dtype=torch.bool)
        ended[lines[keep & content & (lines >= 0)]] = True
        return separators & ~ended[lines.clamp(min=0)]

    def announce(self, first_layer: int) -> None:
        """Tell the cache layers from `first_layer` on (all of them, if never wrapped) what is about to arrive."""
        if self.cache is None:
            return
        if not self.wrapped:
            wrap_cache(self.cache, self.owner, len(self.adapter.decoder_layers))
            self.wrapped, first_layer = True, 0
        memo = {}
        for i in range(first_layer, len(self.cache.layers)):
            if not isinstance(self.cache.layers[i], PrunedLayer):
                continue
            key = self.key(i)
            if key not in memo:
                layout, physical = self.before[i]
                segment = self.segment_at(i)
                plain = self.unpadded and segment is self.whole
                padding, shift = (None, None) if plain else (segment.padding(), self._shift(segment))
                memo[key] = layout.extend(segment.columns.shape[1], padding, segment.dropped, shift, physical)
            self.cache.layers[i].layout = memo[key]

    def _shift(self, segment: Segment) -> Tensor | None:
        """(batch, 1) positions that tokens to come must be moved back by; None for none.

        Callers count on from the last column, which after right padding is not the last token's.
        """
        positions = self.whole.positions
        last = torch.full((self.batch, 1), self.length - 1, device=positions.device)
        shift = counted_from(positions, last) - segment.end
        return shift if bool(shift.any()) else None

    def add_plane(self, layer: int, hidden: Tensor) -> Tensor:
        """A decoder layer's output (batch, n, dim) with the plane that is due there."""
        if not 0 <= layer < len(self.planes):
            return hidden
        return hidden + self.plane(layer, self.segment).to(hidden)

    def plane(self, layer: int, segment: Segment) -> Tensor:
        """(batch, n, dim): a decoder layer's plane, cut and merged like the tokens of a segment; 0 for text."""
        plane = self.planes[layer]
        row, column = self.whole.visual.to(plane.device).nonzero(as_tuple=True)
        into = segment.fate.to(plane.device)[row, column]
        alive = into >= 0
        here = torch.arange(segment.columns.shape[1], device=segment.columns.device).expand_as(segment.columns)
        place = torch.zeros_like(segment.fate).scatter(1, segment.columns, here).to(plane.device)
        index = (row[alive], place[row[alive], into[alive]])
        values = plane[alive]
        zeros = plane.new_zeros(*segment.columns.shape, plane.shape[-1])
        total = zeros.index_put(index, values, accumulate=True)
        count = zeros[..., 0].index_put(index, values.new_ones(len(values)), accumulate=True)
        return total / count.clamp(min=1)[..., None]

    def restore(self, output: Any) -> Any:
        """The language model's output with states of the call's length, which is what callers index them by."""
        if isinstance(output, tuple):
            return self.segment.restore(output[0], self.length), *output[1:]
        output.last_hidden_state = self.segment.restore(output.last_hidden_state, self.length)
        if output.get("hidden_states") is not None:
            # The first is what enters layer 0, each further one what a layer gives; None for one not asked for.
            output.hidden_states = tuple(
                None if state is None else self.segment_at(max(index - 1, 0)).restore(state, self.length)
                for index, state in enumerate(output.hidden_states)
            )
        return output

    # -- what a layer sees --------------------------------------------------------------------------------------

    def positions_at(self, layer: int) -> Tensor:
        """(..., batch, n): position ids in force at a layer."""
        positions, shift = self.segment_at(layer).positions, self.before[layer][0].shift
        return positions if shift is None else (positions - shift.to(positions.device)).clamp(min=0)

    def positions_of_columns(self, segment: Segment) -> Tensor:
        """(..., batch, length): position ids of the call's columns, those of a segment where it has them."""
        positions = self.whole.positions.clone()
        columns = segment.columns.to(positions.device).expand_as(segment.positions)
        return positions.scatter(-1, columns, segment.positions)

    def places_at(self, layer: int, hidden: Tensor) -> Places:
        """The positions of a layer's columns."""
        key = ("places", layer_type(self.text_config, layer), self.key(layer))
        if key not in self.memo:
            positions = self.positions_at(layer).to(hidden.device)
            self.memo[key] = Places(last_axis(positions), self.adapter.rope(layer, hidden, positions))
        return self.memo[key]

    def padding_mask(self, layer: int) -> Tensor | None:
        """2D mask of a layer, logical length; None if all its columns are real and a cache knows the lengths."""
        if self.cache is None:
            return self.segment_at(layer).real
        return self.cached(layer).layout.mask()

    def blocks_at(self, layer: int) -> Tensor | None:
        """(batch, n) long: the block of each column of a layer whose tokens all see one another, -1 for none."""
        if self.blocks is None:
            return None
        segment = self.segment_at(layer)
        return take_columns(self.blocks, segment.columns).masked_fill(~segment.present, -1)

    def mask_at(self, layer: int, hidden: Tensor):
        """Attention mask of a layer in the form its attention back end wants."""
        kind = layer_type(self.text_config, layer)
        key = ("mask", kind, self.key(layer))
        if key not in self.memo:
            blocks = self.blocks_at(layer)
            if blocks is not None:
                blocks = blocks.to(hidden.device)
                if self.cache is not None:
                    # The factories count columns from the start of the unpruned sequence.
                    blocks = pad(blocks, (self.cached(layer).get_seq_length(), 0), value=-1)
            self.memo[key] = layer_mask(
                self.text_config,
                kind,
                hidden,
                self.padding_mask(layer),
                self.cache,
                layer,
                blocks,
                self.adapter.window_cuts_blocks,
            )
        return self.memo[key]

    def model_mask(self, hidden: Tensor) -> Tensor | dict | None:
        """What the language model is called with, whose own masks then fit layer 0: a 2D mask, or ready-made ones where
        it cannot know all they depend on."""
        if self.blocks is None:
            return self.padding_mask(0)
        kinds = [layer_type(self.text_config, layer) for layer in range(len(self.adapter.decoder_layers))]
        masks = {kind: self.mask_at(kinds.index(kind), hidden) for kind in kinds}
        return masks if len(masks) > 1 or self.masks_by_type else masks[kinds[0]]

    @property
    def text_config(self):
        return self.adapter.language_model.config
