# SPDX-License-Identifier: Apache-2.0
"""One forward call of the language model under a session: what came in, where it was cut, what each layer sees."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtprune.adapters.base import Adapter
from vtprune.attention import Places
from vtprune.devices import send
from vtprune.ops.seeded_random import text_key
from vtprune.stages.cache import CacheLayout, Owner, PrunedLayer, pruned_layers, wrap_cache
from vtprune.stages.layout import Groups, SequenceLayout, counted_from, last_axis, take_columns
from vtprune.stages.media import Media
from vtprune.transformers_private import Cache, layer_kinds, layer_mask, layer_type


@dataclass
class Call:
    """State of one forward call that carries visual tokens."""

    adapter: Adapter
    owner: Owner
    batch: int
    length: int
    past: int
    """Logical length of the cache when the call began."""
    cache: Cache | None
    real: Tensor
    """(batch, length) bool, before any cut. On the CPU, as everything that says where tokens are."""
    prompt: Tensor
    """(batch, length) bool: what of it is the prompt, and not an answer or guesses behind it. Choices are made by this
    alone, so that they are those of a prompt without anything behind it."""
    positions: Tensor
    """(..., batch | 1, length): position ids that came in."""
    media: Media
    ids: Tensor | None
    """(batch, length) input ids, on the CPU; None if the caller gave embeddings."""
    embeddings: Tensor
    """(batch, length, dim): what came in, visual features in place."""
    blocks: Tensor | None
    """(batch, any length) long: see `Adapter.blocks`."""
    masks_by_type: bool
    """Whether the call came with a mapping from kinds of attention to masks."""
    deepstack: Mapping[int, Tensor]
    """Decoder layer -> (visual tokens of the batch, dim), which is to be added on its input (DeepStack)."""
    past_real: Tensor | None
    """(batch, past) bool: padding already in a cache that was never pruned; None if there is none."""
    whole: SequenceLayout = field(init=False)
    """The layout before any cut."""
    sequence_layouts: list[SequenceLayout] = field(init=False)
    starts: list[int] = field(init=False)
    """First decoder layer of each layout."""
    before: list[tuple[CacheLayout, int]] = field(init=False)
    """Layout and physical length of every cache layer when the call began."""
    wrapped: bool = field(init=False)
    """Whether the cache layers are ours."""
    entering: Tensor | None = field(default=None, init=False)
    """(batch, n, dim): what DeepStack adds on the input of layer 0, as pruned before the LLM; 0 for text."""
    memo: dict = field(default_factory=dict)
    """Masks and rotary embeddings already built, by `key`."""
    last_rows: int = 0
    """How many last tokens alone may pass the layers that read keys of earlier ones; 0 for all."""
    left_in_cache: dict[int, Tensor] = field(default_factory=dict)
    """Decoder layer -> (batch, n) bool over the columns of its sequence: visual tokens left in its cache after an
    eviction."""

    def __post_init__(self):
        if self.blocks is not None:
            missing = max(self.past + self.length - self.blocks.shape[1], 0)
            here = slice(self.past, self.past + self.length)
            self.blocks = pad(self.blocks, (0, missing), value=-1)[:, here].to(self.embeddings.device)
        self.whole = SequenceLayout.whole(self.real, self.media.visual, self.positions)
        self.sequence_layouts, self.starts = [self.whole], [0]
        self.wrapped = bool(pruned_layers(self.cache))
        depth = len(self.adapter.decoder_layers)
        if self.wrapped:
            layers = [self.cached(i) for i in range(depth)]
            self.before = [(layer.layout, layer.physical) for layer in layers]
            self.update_cache_layouts(0)
        else:
            past_real = None if self.past_real is None else send(self.past_real, self.embeddings.device)
            self.before = [(CacheLayout(real=past_real), self.past)] * depth

    @property
    def sequence(self) -> SequenceLayout:
        """The layout after the last cut so far."""
        return self.sequence_layouts[-1]

    @functools.cached_property
    def text(self) -> Tensor:
        """(batch, length) bool: the prompt without visual tokens and what a processor puts around them."""
        images = self.media.images
        return self.prompt & ~self.media.visual & ~self.adapter.markers(self.ids, images)

    @property
    def pruned(self) -> bool:
        """Whether this call has dropped anything so far."""
        # Not by length: the longest sample of a batch may have lost nothing.
        return self.sequence is not self.whole

    def prompt_at(self, sequence: SequenceLayout) -> Tensor:
        """(batch, n) bool: the columns of a sequence that are of the prompt."""
        return take_columns(self.prompt, sequence.columns)

    def cached(self, layer: int) -> PrunedLayer:
        """What a wrapped cache holds for a decoder layer, which may be the keys of an earlier one.

        A layer that carries a state instead has what all others have: where such layers are, nothing is cut between.
        """
        there = self.cache.layers[self.adapter.key_sources[layer]]
        return there if isinstance(there, PrunedLayer) else pruned_layers(self.cache)[0]

    def sequence_at(self, layer: int) -> SequenceLayout:
        return self.sequence_layouts[bisect_right(self.starts, layer) - 1]

    def key(self, layer: int) -> tuple[int, int, int]:
        """Layers with equal keys see the same columns at the same positions through the same mask."""
        layout, physical = self.before[layer]
        return id(self.sequence_at(layer)), id(layout), physical

    # -- groups -------------------------------------------------------------------------------------------------

    def alive(self, labels: Tensor, sequence: SequenceLayout | None = None) -> Tensor:
        """Labels (batch, length) of a sequence's columns, by default the current one's; -1 where no visual token is."""
        sequence = sequence or self.sequence
        return take_columns(labels, sequence.columns).masked_fill(~sequence.visual, -1)

    def crop_labels(self, sequence: SequenceLayout | None = None) -> Tensor:
        """(batch, n) long: the crop of each column, by default of the current ones; -1 for separators and text."""
        return self.alive(self.media.labels, sequence)

    def crop_groups(self) -> Groups:
        """One group a crop, over the visual tokens alive."""
        return Groups.of_labels(self.crop_labels(), self.media.crop_rows, self.media.crop_images)

    def image_groups(self) -> Groups:
        """One group an image or video, over the visual tokens alive; separators are in none."""
        content = self.crop_labels() >= 0
        rows = self.media.image_rows
        images = torch.arange(len(rows))
        return Groups.of_labels(self.alive(self.media.images).masked_fill(~content, -1), rows, images)

    def sample_groups(self, sequence: SequenceLayout | None = None) -> Groups:
        """One group a sample, over the visual tokens alive, by default now; separators are in none."""
        rows = torch.arange(self.batch)
        content = self.crop_labels(sequence) >= 0
        return Groups.of_labels(torch.where(content, rows[:, None], -1), rows, torch.full_like(rows, -1))

    def runs(self) -> Tensor:
        """(batch, n) long: for current visual columns the number of their run of visual columns in the sample."""
        visual = self.sequence.visual
        begins = visual.clone()
        begins[:, 1:] &= ~visual[:, :-1]
        return begins.cumsum(1) - 1

    def encoded_tokens(self) -> Tensor:
        """(batch, n): number among the encoded tokens of every current column."""
        return take_columns(self.media.tokens, self.sequence.columns)

    def prompt_key(self, row: int) -> int:
        """A number that depends on the text of one sample's prompt alone."""
        if self.ids is None:
            return 0
        return text_key(self.ids[row][self.prompt[row] & ~self.media.visual[row]].tolist())

    # -- the cache ---------------------------------------------------------------------------------------------------

    def update_cache_layouts(self, first_layer: int) -> None:
        """Tell the cache layers from `first_layer` on (all of them, if never wrapped) what is about to arrive."""
        if self.cache is None:
            return
        if not self.wrapped:
            wrap_cache(self.cache, self.owner, max(self.adapter.key_sources) + 1)
            self.wrapped, first_layer = True, 0
        memo = {}
        for i in range(first_layer, len(self.cache.layers)):
            if not isinstance(self.cache.layers[i], PrunedLayer):
                continue
            key = self.key(i)
            if key not in memo:
                layout, physical = self.before[i]
                sequence = self.sequence_at(i)
                padding, shift = sequence.padding(), self._shift(sequence)
                padding = None if padding is None else send(padding, self.embeddings.device)
                memo[key] = layout.extend(sequence.columns.shape[1], padding, sequence.dropped, shift, physical)
            self.cache.layers[i].layout = memo[key]

    def _shift(self, sequence: SequenceLayout) -> Tensor | None:
        """(batch, 1) positions that tokens to come must be moved back by; None for none.

        Callers count on from the last column, which after right padding is not the last token's.
        """
        # Position ids lie on the device, so whether they were moved is told by what may move them.
        if sequence.end is self.whole.end and bool(self.real[:, -1].all()):
            return None
        positions = self.whole.positions
        return counted_from(positions, torch.full((self.batch, 1), self.length - 1)) - sequence.end

    def take_deepstack(self, deepstack: Mapping[int, Tensor], entering: Tensor) -> Tensor:
        """Add DeepStack features from now on instead of the model.

        entering: embeddings (batch, n, dim) with what is due on the input of layer 0. Returns them without it: some
        language models scale the embeddings that they are called with, but nothing that they add.
        """
        self.deepstack = deepstack
        if 0 not in deepstack:
            return entering
        visual = send(self.sequence.visual, entering.device)[..., None]
        self.entering = entering.masked_fill(~visual, 0)
        return entering.masked_fill(visual, 0)

    def add_deepstack(self, layer: int, hidden: Tensor) -> Tensor:
        """A decoder layer's input (batch, n, dim) with the DeepStack features that are due there."""
        if layer == 0 and self.entering is not None:
            return hidden + self.entering.to(hidden)
        if layer not in self.deepstack:
            return hidden
        return hidden + self.deepstack_at(layer, self.sequence).to(hidden)

    def deepstack_at(self, layer: int, sequence: SequenceLayout) -> Tensor:
        """(batch, n, dim): DeepStack features of a decoder layer, cut and merged like the tokens; 0 for text."""
        features = self.deepstack[layer]
        row, column = self.whole.visual.nonzero(as_tuple=True)
        into = sequence.merged_into[row, column]
        alive = (into >= 0).nonzero()[:, 0]
        row, into = row[alive], into[alive]
        parts = (alive, row, sequence.places()[row, into])
        alive, *index = (send(part, features.device) for part in parts)
        values = features[alive]
        zeros = features.new_zeros(*sequence.columns.shape, features.shape[-1])
        total = zeros.index_put(tuple(index), values, accumulate=True)
        count = zeros[..., 0].index_put(tuple(index), values.new_ones(len(values)), accumulate=True)
        return total / count.clamp(min=1)[..., None]

    def restore(self, output: Any) -> Any:
        """The language model's output with states of the call's length, which is what callers index them by."""
        if isinstance(output, tuple):
            return self._restored(output[0]), *output[1:]
        output.last_hidden_state = self._restored(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            # The first is what enters layer 0, each further one what a layer gives; None for one not asked for.
            output.hidden_states = tuple(
                None if state is None else self._restored_states(self.sequence_at(max(index - 1, 0)), state)
                for index, state in enumerate(output.hidden_states)
            )
        return output

    def _restored(self, hidden: Tensor) -> Tensor:
        """What leaves the last layer, at the call's length; if the last tokens alone left it, they are the call's."""
        return hidden if self.is_tail(hidden) else self.sequence.restore(hidden, self.length)

    def _restored_states(self, sequence: SequenceLayout, hidden: Tensor) -> Tensor:
        """What enters or leaves a layer, at the call's length."""
        return self.adapter.layer_input(sequence.restore(self.adapter.token_states(hidden), self.length))

    def is_tail(self, hidden: Tensor) -> bool:
        """Whether hidden states (batch, n, dim) are those of the sequence's last tokens alone."""
        return bool(self.last_rows) and hidden.shape[1] == self.last_rows < self.sequence.columns.shape[1]

    def from_first_layer(self, layer: int) -> Callable[[Tensor], Tensor]:
        """Takes what has one entry a token of the first layer, (batch, n, ...), to the tokens of a layer."""
        return self.sequence_at(layer).takes_from(self.sequence_at(0))

    # -- what a layer sees --------------------------------------------------------------------------------------

    def positions_at(self, layer: int) -> Tensor:
        """(..., batch, n): position ids in force at a layer."""
        positions, shift = self.sequence_at(layer).positions, self.before[layer][0].shift
        return positions if shift is None else (positions - shift.to(positions.device)).clamp(min=0)

    def positions_of_columns(self, sequence: SequenceLayout) -> Tensor:
        """(..., batch, length): position ids of the call's columns, those of a sequence where it has them."""
        positions = self.whole.positions.clone()
        columns = send(sequence.columns, positions.device).expand_as(sequence.positions)
        return positions.scatter(-1, columns, sequence.positions)

    def places_at(self, layer: int, hidden: Tensor) -> Places:
        """The positions of a layer's columns."""
        key = ("places", self.adapter.rope_kinds[layer], self.key(layer))
        if key not in self.memo:
            positions = self.positions_at(layer).to(hidden.device)
            self.memo[key] = Places(last_axis(positions), self.adapter.rope(layer, hidden, positions))
        return self.memo[key]

    def padding_mask(self, layer: int) -> Tensor | None:
        """2D mask of a layer, logical length; None if all its columns are real and a cache knows the lengths."""
        if self.cache is None:
            return send(self.sequence_at(layer).real, self.embeddings.device)
        return self.cached(layer).padding_mask()

    def blocks_at(self, layer: int, sequence: SequenceLayout | None = None) -> Tensor | None:
        """(batch, n) long: the block of each column whose tokens all see one another in a layer, -1 for none; of the
        layer's own columns, or those of another sequence."""
        if self.blocks is None or not self.adapter.has_blocks(layer_type(self.text_config, layer)):
            return None
        sequence = sequence or self.sequence_at(layer)
        return take_columns(self.blocks, sequence.columns).masked_fill(~send(sequence.present, self.blocks.device), -1)

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
        kinds = layer_kinds(self.text_config, len(self.adapter.decoder_layers))
        masks = {kind: self.mask_at(kinds.index(kind), hidden) for kind in kinds}
        return masks if len(masks) > 1 or self.masks_by_type else masks[kinds[0]]

    @property
    def text_config(self):
        return self.adapter.language_model.config
