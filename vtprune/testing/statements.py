# SPDX-License-Identifier: Apache-2.0
"""What an adapter states about a model, compared with what the model does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import vtprune
from vtprune.adapters.base import Adapter
from vtprune.signals import AttentionReceived, ClsAttention, EncoderFeatures, EncoderOutput, EncoderSignal
from vtprune.testing.attention import SHARE_OF_WEIGHTS, WEIGHTS, eager
from vtprune.testing.batching import Encoded, encode_all, media_per_sample
from vtprune.testing.cases import Refused, Result, compared, found, largest_difference
from vtprune.tokens import Medium
from vtprune.transformers_private import eager_encoder_attention, with_first_features


class Look:
    """A model, a batch of inputs for it, and what its adapter says about them."""

    def __init__(self, adapter: Adapter, inputs: dict[str, Tensor]):
        self.adapter, self.model, self.inputs = adapter, adapter.model, inputs

    @functools.cached_property
    def encoded(self) -> list[Encoded]:
        """One a kind of medium that the batch holds."""
        return encode_all(self.adapter, self.inputs)

    def media(self, encoded: Encoded) -> list[Medium]:
        return self.adapter.media(encoded.kind, encoded.arguments, encoded.features)

    def contents(self) -> Tensor:
        """(content tokens,) long: numbers of the visual tokens of all kinds, crop after crop, separators left out."""
        order, start = [], 0
        for encoded in self.encoded:
            for medium in self.media(encoded):
                order += [(medium.crops == crop).nonzero().flatten() + start for crop in range(len(medium.grids))]
                start += len(medium)
        return torch.cat(order)

    def shown(self, asked: Sequence[EncoderSignal]) -> dict[EncoderSignal, Tensor]:
        """Signal -> (content tokens, ...): what a method before the LLM is shown, in the order of `contents`."""
        kinds, seen = [encoded.kind for encoded in self.encoded], {}

        @dataclass(frozen=True, kw_only=True)
        class Spy(vtprune.BeforeLLM):
            name: ClassVar[str] = "a method that reads the encoder"
            signal: ClassVar[str] = "the encoder"

            def signals(self, shape):
                return tuple(asked)

            def scores(self, tokens):
                # Groups of a mixed batch are in the order of the prompt.
                order = [group for kind in kinds for group, found in enumerate(tokens.kinds) if found == kind]
                for signal in asked:
                    value = tokens[signal]
                    if isinstance(signal, ClsAttention):  # (groups, layers, heads, tokens)
                        value = value[:, 0].mT
                    seen[signal] = torch.cat([value[group, tokens.valid[group]] for group in order])
                return tokens.features[..., 0]

        with vtprune.prune(self.model, Spy(keep_ratio=0.5)), torch.no_grad():
            self.model(**self.inputs)
        return seen

    def rows(self, encoded: Encoded, values: Tensor) -> Tensor:
        """Values of the encoder's tokens (crops, tokens, dim), a CLS token included, as (visual tokens, dim)."""
        cut = int(self.adapter.shape.has_cls and self.adapter.cuts_cls(encoded.kind))
        return self.adapter.patch_values(encoded.kind, encoded.arguments, values[:, cut:])

    @functools.cached_property
    def spied(self) -> dict[EncoderSignal, Tensor]:
        """The same of the features, and of output and attention of the layer that the projector reads."""
        shape = self.adapter.shape
        layer = shape.feature_layer
        asked: list[EncoderSignal] = [] if self.adapter.features_unread else [EncoderFeatures()]
        if not self.adapter.layers_unread:
            asked += [EncoderOutput(layer), AttentionReceived(layer)]
            if shape.has_cls:
                asked.append(ClsAttention((layer,)))
        return self.shown(asked)


def depths(look: Look) -> Result:
    """The stated depths are those of the modules."""
    adapter, shape = look.adapter, look.adapter.shape
    for name, stated, there in (
        ("decoder_layers", shape.decoder_layers, len(adapter.language_model.layers)),
        ("encoder_layers", shape.encoder_layers, len(adapter.encoder_layers())),
    ):
        if stated != there:
            return Result("", "", "failed", float(stated), float(there), f"shape.{name} is {stated}; there are {there}")
    if shape.encoder_layers and not 0 <= shape.feature_layer < shape.encoder_layers:
        return found("failed", f"shape.feature_layer is {shape.feature_layer}, of layers 0..{shape.encoder_layers - 1}")
    return found("ok")


@torch.no_grad()
def feature_layer(look: Look) -> Result:
    """The stated encoder layer is the deepest one whose output moves the features."""
    stated = look.adapter.shape.feature_layer
    if look.adapter.layers_unread and not look.adapter.shape.encoder_layers:
        raise Refused(f"not checked: no layers are stated: {look.adapter.layers_unread}")
    for encoded in look.encoded:
        layers = look.adapter.encoder_layers(encoded.kind)
        moving = [index for index in range(stated, len(layers)) if _moves(look, encoded, layers[index])]
        if layers and (not moving or max(moving) != stated):
            deepest = f"layer {max(moving)}" if moving else "none from there on"
            return found(
                "failed", f"shape.feature_layer is {stated}; the deepest that {encoded.kind}s need is {deepest}"
            )
    return found("ok")


def _moves(look: Look, encoded: Encoded, layer: nn.Module) -> bool:
    """Whether the features depend on what an encoder layer puts out."""

    def disturb(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
        hidden = hidden + hidden.abs().mean() * noise
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    # Before the hooks by which transformers collects the outputs of layers.
    handle = layer.register_forward_hook(disturb, prepend=True)
    try:
        (again,) = encode_all(look.adapter, look.inputs, encoded.kind)
    finally:
        handle.remove()
    return not torch.equal(again.rows, encoded.rows)


def _masked(mask: Any) -> int:
    """Tokens that no query attends to by a mask (batch, 1, queries, tokens), flags or what is added to scores."""
    if not torch.is_tensor(mask) or mask.ndim != 4:
        return 0
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return int((~seen[:, 0].any(1)).sum())


@torch.no_grad()
def sequences(look: Look) -> Result:
    """The encoder ran over the stated patches, with a CLS token before each sequence if there is said to be one."""
    adapter = look.adapter
    if adapter.layers_unread and adapter.encoder_uncounted:
        raise Refused(f"not checked: {adapter.encoder_uncounted}")
    for encoded in look.encoded:
        seen: list[int] = []
        hidden_keys: list[int] = []

        def note(module, args, kwargs, seen=seen, hidden_keys=hidden_keys):
            hidden = args[0] if args else next(value for value in kwargs.values() if torch.is_tensor(value))
            seen.append(hidden[..., 0].numel())
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            hidden_keys.append(_masked(mask))

        handle = adapter.encoder_layers(encoded.kind)[0].register_forward_pre_hook(note, with_kwargs=True)
        try:
            encode_all(adapter, look.inputs, encoded.kind)
        finally:
            handle.remove()
        whole = adapter.encoder_sequences(encoded.kind, encoded.arguments)
        stated = [one if isinstance(one, int) else one[0] for one in whole]
        patches, cls = sum(stated), len(stated) * adapter.shape.has_cls
        there = sum(seen)
        # What pads a smaller tile of a batch, and no patch attends to, need not be stated.
        if patches + cls not in (there, there - sum(hidden_keys)):
            return Result(
                "", "", "failed", float(patches + cls), float(there),
                f"{patches} patches in {len(stated)} sequences and {cls} CLS tokens are stated; the {encoded.kind} "
                f"encoder runs on {there} tokens",
            )  # fmt: skip
    return found("ok")


def layout(look: Look) -> Result:
    """The stated images lay out exactly the columns that hold features."""
    if not look.encoded:
        return found("failed", f"the inputs hold no pixels; kinds are {', '.join(look.adapter.kinds)}")
    for encoded in look.encoded:
        kind, tokens = encoded.kind, encoded.columns.sum(1)
        total = int(tokens.sum())
        if total != len(encoded.rows):
            return Result(
                "", "", "failed", float(total), float(len(encoded.rows)),
                f"{total} columns hold the {kind} id {look.adapter.visual_token_ids[kind]}; the model gives "
                f"{len(encoded.rows)} {kind} tokens",
            )  # fmt: skip
        media = look.media(encoded)
        lengths = [len(medium) for medium in media]
        if sum(lengths) != total:
            return Result(
                "", "", "failed", float(sum(lengths)), float(total),
                f"media() lays out {lengths} tokens; the prompts hold {tokens.tolist()} of the {kind} id",
            )  # fmt: skip
        media_per_sample(encoded)
        if not set(tokens.cumsum(0).tolist()) <= {0, *torch.tensor(lengths).cumsum(0).tolist()}:
            return found("failed", f"media() lays out {lengths} tokens; the prompts end after {tokens.tolist()}")
        for number, medium in enumerate(media):
            if reason := _misfit(medium):
                return found("failed", f"{kind} {number}: {reason}")
    return found("ok")


def _misfit(medium: Medium) -> str | None:
    """What is wrong about a layout in itself."""
    counts = torch.bincount(medium.crops[medium.crops >= 0], minlength=len(medium.grids)).tolist()
    if len(counts) != len(medium.grids) or 0 in counts:
        return f"its crops have {counts} tokens and {len(medium.grids)} grids"
    for crop, (grid, tokens) in enumerate(zip(medium.grids, counts, strict=True)):
        if grid is not None and len(grid) != tokens:
            return f"crop {crop} has {tokens} tokens and {grid} with {len(grid)}"
    separators = (medium.crops < 0).sum().item()
    if (medium.lines is None) != (separators == 0):
        return f"it has {separators} separators (crops -1) and {'no ' if medium.lines is None else ''}lines"
    if medium.lines is not None:
        if medium.lines.shape != medium.crops.shape:
            return f"its lines have another shape than its crops: {medium.lines.shape} and {medium.crops.shape}"
        named = medium.lines[medium.lines >= 0].unique().tolist()
        ends = medium.lines[(medium.crops < 0) & (medium.lines >= 0)].sort().values.tolist()
        if not named == ends == list(range(len(ends))):
            return f"lines name {named}, and separators {ends}"
    return None


@torch.no_grad()
def features(look: Look) -> Result:
    """In the columns of the placeholders stands what the model's encode functions give."""
    seen: list[Tensor] = []

    def note(module, args, kwargs):
        seen.append(with_first_features(look.adapter.embedded(kwargs)["inputs_embeds"], kwargs).clone())

    handle = look.adapter.language_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        look.model(**look.inputs)
    finally:
        handle.remove()
    measured = 0.0
    for encoded in look.encoded:
        rows = encoded.rows.to(seen[0])
        measured = max(measured, largest_difference(seen[0][encoded.columns], rows))
    return compared(measured, 0.0)


def encoder_rows(look: Look) -> Result:
    """Every visual token has one row of the encoder's values, which is its own."""
    if look.adapter.features_unread:
        raise Refused(f"not checked: nothing of the encoder can be read: {look.adapter.features_unread}")
    count = len(look.contents())
    for signal, rows in look.spied.items():
        name = type(signal).__name__
        if len(rows) != count:
            return Result("", "", "failed", float(len(rows)), float(count), f"{name} has {len(rows)} rows for {count}")
        if not bool(rows.isfinite().all()):
            return found("failed", f"{name} has values that are not finite")
        # Padding inside a tile receives no attention.
        empty = 0 if isinstance(signal, AttentionReceived) else int((rows.view(count, -1) == 0).all(1).sum())
        if empty:
            return Result("", "", "failed", float(empty), 0.0, f"{name}: {empty} visual tokens of {count} have none")
    return found("ok")


@torch.no_grad()
def encoder_attention(look: Look) -> Result:
    """The encoder's attention that methods are shown is what its eager code computes."""
    if look.adapter.layers_unread:
        raise Refused(f"not checked: nothing of the encoder's layers can be read: {look.adapter.layers_unread}")
    shape = look.adapter.shape
    shown = {
        signal: rows for signal, rows in look.spied.items() if isinstance(signal, ClsAttention | AttentionReceived)
    }
    expected: dict[Any, list[Tensor]] = {signal: [] for signal in shown}
    for encoded, calls in _eager_calls(look):
        for signal, rows in expected.items():
            if isinstance(signal, ClsAttention):
                values = torch.cat([weights[:, :, 0].mT for weights, _ in calls], 1)
            else:
                values = torch.cat([received(*call) for call in calls], 1)[..., None]
            rows.append(look.rows(encoded, values))
    order, measured, largest = look.contents(), 0.0, 0.0
    for signal, parts in expected.items():
        rows = torch.cat(parts)[order]
        measured = max(measured, largest_difference(shown[signal].view(rows.shape), rows))
        largest = max(largest, rows.abs().max().item())
    exact = look.model.dtype in (torch.float32, torch.float64)
    return compared(measured, WEIGHTS if exact else SHARE_OF_WEIGHTS * largest, f"encoder layer {shape.feature_layer}")


def _eager_calls(look: Look) -> Iterator[tuple[Encoded, list[tuple[Tensor, Tensor | None]]]]:
    """Each kind, and weights (sequences, heads, n, n) and mask of each call of the eager attention function in the
    encoder layer that the projector reads."""
    for encoded in look.encoded:
        layer = look.adapter.encoder_layers(encoded.kind)[look.adapter.shape.feature_layer]
        try:
            with eager(look.model), eager_encoder_attention(look.adapter.encoder_attention(layer)) as calls:
                encode_all(look.adapter, look.inputs, encoded.kind)
        except vtprune.UnsupportedStageError as error:
            raise Refused(f"not checked: {error}") from error
        if not calls:
            raise Refused("not checked: the encoder's eager attention gives no weights")
        yield encoded, [(cls_first(look.adapter, weights.float(), -2, -1), mask) for weights, mask in calls]


def cls_first(adapter: Adapter, values: Tensor, *axes: int) -> Tensor:
    """Values with axes of encoder tokens, a CLS token among them first, as what is recorded has it."""
    return values.roll([int(adapter.cls_is_last)] * len(axes), axes)


def received(weights: Tensor, mask: Tensor | None) -> Tensor:
    """(sequences, tokens): what each token receives, the mean over heads and over the real tokens that can see it."""
    if mask is None:
        return weights.mean((1, 2))
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    visible = visible.expand(len(weights), 1, *weights.shape[2:])[:, 0].float()
    real = visible.amax(1)[..., None]  # padding is what no token sees
    return (weights.mean(1) * real).sum(1) / (visible * real).sum(1).clamp(min=1)


@dataclass(frozen=True)
class Statement:
    """One thing that adapters state, as a function and in words."""

    run: Callable[[Look], Result]
    broken: str
    """what it means if it is not so"""


STATEMENTS: dict[str, Statement] = {
    "shape": Statement(depths, "methods choose layers that are not there"),
    "layout": Statement(layout, "methods are shown tokens of other images, or sessions end in an error"),
    "features": Statement(features, "methods are shown what the language model does not read"),
    "encoder layer": Statement(feature_layer, "methods read another encoder layer than the projector"),
    "encoder tokens": Statement(sequences, "a CLS token is taken for a patch or a patch for one, and FLOPs are wrong"),
    "encoder rows": Statement(encoder_rows, "methods that read the encoder judge tokens by the values of others"),
    "encoder attention": Statement(encoder_attention, "methods that go by the encoder's attention read wrong numbers"),
}
"""Name -> statement, those first that others build on."""
