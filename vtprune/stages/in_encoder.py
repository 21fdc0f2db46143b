# SPDX-License-Identifier: Apache-2.0
"""Inside the vision encoder: merges tokens on the output of a layer, so that the layers after it run on fewer.

Between its layers the encoder still passes on one row a token, those that were merged alike: each layer is given the
rows that are left, and what it returns is scattered back to all rows. So shapes outside the layers do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtprune.adapters.base import Adapter
from vtprune.devices import read
from vtprune.errors import UnsupportedStageError
from vtprune.methods.base import InEncoder
from vtprune.stages.choosing import Profile, counting
from vtprune.stages.hooks import hidden_of, with_hidden
from vtprune.stages.layout import take_columns
from vtprune.stages.reading import signal_reader
from vtprune.tokens import Grid, ModelShape, Selection, VisualTokens
from vtprune.transformers_private import encoder_mask


@dataclass(frozen=True)
class EncoderMerge:
    """Which tokens of an encoder's crops are left, and where all of them went. CLS tokens, never merged, come first."""

    copies: Tensor
    """(visual tokens,) long: the encoder's token, numbered through over all crops, that each visual token is made of;
    -1 where it is made of several."""
    places: Tensor
    """(crops, left) long: the tokens left, ascending; 0 for padding."""
    valid: Tensor
    """(crops, left) bool."""
    slots: Tensor
    """(crops, tokens) long: index in `places` of the token that each went into; -1 if it was dropped."""
    lengths: tuple[tuple[int, Tensor], ...] = ()
    """Encoder layers on whose output tokens went, and the (crops,) tokens left since."""
    counts: tuple[tuple[int, int], ...] = ()
    """Tokens that each encoder layer's attention and its MLP ran on, where they differ; empty if they do not."""
    _masks: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Attention masks made so far; layers share them."""

    @classmethod
    def nothing(cls, copies: Tensor, crops: int, tokens: int, device: torch.device) -> EncoderMerge:
        """All tokens stand for themselves."""
        places = torch.arange(tokens, device=device).expand(crops, -1)
        return cls(copies, places, torch.ones_like(places, dtype=torch.bool), places)

    def left(self, hidden: Tensor) -> Tensor:
        """(crops, tokens, dim) -> (crops, left, dim), zero for padding."""
        valid = self.valid.to(hidden.device)
        return take_columns(hidden, self.places).masked_fill(~valid[..., None], 0)

    def scattered(self, values: Tensor) -> Tensor:
        """(crops, left[, dim]) -> (crops, tokens[, dim]): each token has what it went into has, zero if dropped."""
        slots = self.slots.to(values.device)
        gone = slots < 0
        return take_columns(values, slots.clamp(min=0)).masked_fill(gone if values.ndim == 2 else gone[..., None], 0)

    @cached_property
    def padding(self) -> Tensor | None:
        """`valid`, or None if all is."""
        # Asked for in every layer, and an accelerator would have to wait each time.
        return None if bool(self.valid.all()) else self.valid

    def mask(self, config: Any, hidden: Tensor) -> Tensor | None:
        """Attention mask of the layers that run on what is left, for the device of `hidden`; None if all is valid."""
        if self.padding is None:
            return None
        if hidden.device not in self._masks:
            self._masks[hidden.device] = encoder_mask(config, hidden, self.padding.to(hidden.device))
        return self._masks[hidden.device]

    def after(self, layer: int, selection: Selection) -> EncoderMerge:
        """Once a selection among the tokens left, CLS tokens included, is applied on a layer's output."""
        keep = selection.keep & self.valid
        here = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
        sources = here.masked_fill(~keep, -1) if selection.sources is None else selection.sources
        rank = keep.cumsum(1) - 1
        into = torch.where(sources >= 0, rank.gather(1, sources.clamp(min=0)), -1)
        slots = torch.where(self.slots >= 0, into.gather(1, self.slots.clamp(min=0)), -1)
        counts = keep.sum(1)
        order = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
        valid = keep.gather(1, order)
        places = self.places.gather(1, order).masked_fill(~valid, 0)
        return EncoderMerge(self.copies, places, valid, slots, (*self.lengths, (layer, counts.cpu())))

    def sequences(self, whole: list[int], shape: ModelShape) -> list[int | tuple[int | tuple[int, int], ...]]:
        """Patches of every sequence, of which there are `whole` if nothing merges, in the form of `cost.encoder_flops`:
        one number a layer, or two inside layers."""
        if self.counts:
            return [self.counts] * len(whole)
        if not self.lengths:
            return [*whole]
        rows = []
        for crop, patches in enumerate(whole):
            row = [patches] * shape.encoder_layers
            for layer, lengths in self.lengths:
                left = int(lengths[crop]) - int(shape.has_cls)
                row[layer + 1 :] = [left] * (shape.encoder_layers - layer - 1)
            rows.append(tuple(row))
        return rows

    def copied_into(self) -> tuple[Tensor, Tensor]:
        """(visual tokens,) long: the encoder's token that each visual token is a copy of now, -1 where it is made of
        several, -2 where it was dropped; and bool, whether that is the one it always was."""
        slots, places = read(self.slots, self.places)
        starts = torch.arange(len(slots))[:, None] * slots.shape[1]
        into = torch.where(slots >= 0, places.gather(1, slots.clamp(min=0)) + starts, -2)
        into = torch.where(self.copies >= 0, into.flatten()[self.copies.clamp(min=0)], -1)
        return into, into == self.copies


def copied_tokens(adapter: Adapter, kind: str, inputs: Mapping[str, Any], crops: int, tokens: int) -> Tensor:
    """(visual tokens,) long: the encoder's token, numbered through over all crops, that each visual token is made of;
    -1 where it is made of several, and for separators."""
    first, is_one = _made_of(adapter, kind, inputs, crops, tokens)
    return torch.where(is_one, first.long() - 1, -1)


def has_mixed_tokens(adapter: Adapter, kind: str, inputs: Mapping[str, Any], crops: int, tokens: int) -> bool:
    """Whether any visual token is made of several of the encoder's."""
    return not bool(_made_of(adapter, kind, inputs, crops, tokens)[1].all())


def _made_of(adapter: Adapter, kind: str, inputs: Mapping[str, Any], crops: int, tokens: int) -> tuple[Tensor, Tensor]:
    """(visual tokens,) mean number, from 1, of the encoder's tokens that each is made of, 0 for separators; and bool,
    whether it is made of one at most."""
    # A mean of different numbers has a smaller square than the mean of their squares. Exact up to 2**26 tokens.
    numbers = torch.arange(1, crops * tokens + 1, dtype=torch.double).view(crops, tokens, 1)
    has_cls = adapter.shape.has_cls and adapter.cuts_cls(kind)
    values = adapter.patch_values(kind, inputs, torch.cat([numbers, numbers.square()], -1)[:, int(has_cls) :])
    first, second = values.unbind(-1)
    return first, first.square() == second


def _nothing_to_read(signal: Any) -> Any:
    """No signal can be read inside the encoder: `check_signals` refuses methods that list one."""
    raise UnsupportedStageError(f"{type(signal).__name__} cannot be read inside the vision encoder")


class EncoderCut:
    """Hooks on the layers of the vision encoder that merge on the output of chosen ones."""

    def __init__(
        self, adapter: Adapter, methods: Sequence[InEncoder], encoding: Callable[[], Any], *, profile: Profile
    ):
        """encoding: gives the `EncoderCall` that is being computed, None outside of the session's encode methods."""
        self.adapter = adapter
        self.encoding = encoding
        self.profile = profile
        self.cuts: dict[int, list[InEncoder]] = {}
        for method in methods:
            for layer in method.cuts(adapter.shape):
                self.cuts.setdefault(layer, []).append(method)
        self.compact = any(method.positions == "compact" for method in methods)
        if self.cuts and not adapter.merges_in_encoder:
            names = ", ".join(sorted({method.name for method in methods}))
            raise UnsupportedStageError(
                f"{names}: tokens cannot be merged inside the vision encoder of {adapter.family} "
                f"({adapter.why_unmerged()}); methods that act behind it work: divprune, cdpruner"
            )

    def install(self, layers: Sequence[nn.Module]) -> Iterator[RemovableHandle]:
        """Yields what takes each hook off again, as soon as it is on."""
        if not self.cuts:
            return
        first = min(self.cuts)
        for index, layer in enumerate(layers):
            if index > first:
                yield layer.register_forward_pre_hook(self._before_layer, with_kwargs=True)
                attention = self.adapter.encoder_attention(layer)
                yield attention.register_forward_pre_hook(self._before_attention, with_kwargs=True)
            if index >= first:
                # transformers collects hidden states by hooks of its own, which have to see all rows.
                yield layer.register_forward_hook(self._after_layer(index, index == first), prepend=True)

    def _before_layer(self, module, args, kwargs):
        encoding = self.encoding()
        if encoding is None or encoding.merge is None:
            return None
        return with_hidden(args, kwargs, encoding.merge.left(hidden_of(args, kwargs)))

    def _before_attention(self, module, args, kwargs):
        encoding = self.encoding()
        if encoding is None or encoding.merge is None:
            return None
        mask = encoding.merge.mask(module.config, hidden_of(args, kwargs))
        if mask is None:
            return None
        return args, {**kwargs, "attention_mask": mask}

    def _after_layer(self, index: int, is_first: bool):
        def hook(module, args, output):
            encoding = self.encoding()
            if encoding is None:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            if is_first:
                crops, tokens = hidden.shape[:2]
                copies = copied_tokens(self.adapter, encoding.kind, encoding.inputs, crops, tokens)
                # Where every visual token is made of several patches, merging a few of them frees none.
                has_copies = bool((copies >= 0).any())
                encoding.merge = EncoderMerge.nothing(copies, crops, tokens, hidden.device) if has_copies else None
            if encoding.merge is None:
                return None
            for method in self.cuts.get(index, ()):
                hidden = self._cut(index, method, encoding, hidden)
            hidden = encoding.merge.scattered(hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    def _cut(self, layer: int, method: InEncoder, encoding, hidden: Tensor) -> Tensor:
        """hidden: (crops, left, dim)."""
        merge, prefix = encoding.merge, int(self.adapter.shape.has_cls)
        crops, tokens = merge.slots.shape
        seen = torch.zeros(crops * tokens, dtype=torch.bool)
        seen[merge.copies[merge.copies >= 0]] = True
        visual = seen.view(crops, tokens)[:, prefix:].sum(1)
        budget = method.budgets(visual)
        budget = torch.where(budget >= 0, budget + (tokens - prefix - visual), -1)
        patches = tokens - prefix
        side = isqrt(patches)
        whole = not merge.lengths and side * side == patches
        visual_tokens = VisualTokens(
            features=hidden[:, prefix:].detach(),
            valid=merge.valid[:, prefix:],
            budget=budget.to(hidden.device),
            layouts=((Grid(side, side) if whole else None,),) * crops,
            kinds=(encoding.kind,) * crops,
            signals=signal_reader(method, self.adapter.shape, _nothing_to_read, hidden.device),
            shape=self.adapter.shape,
            layer=layer,
        )
        with counting(encoding, self.profile):
            selection = method.choose(visual_tokens)
        first_rows = torch.arange(prefix, device=hidden.device).expand(crops, -1)
        keep = torch.cat([torch.ones_like(first_rows, dtype=torch.bool), selection.keep], 1)
        sources = selection.sources
        if sources is not None:
            sources = torch.cat([first_rows, torch.where(sources >= 0, sources + prefix, -1)], 1)
        if selection.features is not None:
            merged = torch.where(selection.keep[..., None], selection.features.to(hidden), hidden[:, prefix:])
            hidden = torch.cat([hidden[:, :prefix], merged], 1)
        # Rows of what is left now, by their places among all.
        scattered = merge.scattered(hidden)
        encoding.merge = merge.after(layer, Selection(keep, None, sources))
        return encoding.merge.left(scattered)
