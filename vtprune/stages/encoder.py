# SPDX-License-Identifier: Apache-2.0
"""The vision encoder: watches what it computes for each image or video, for methods that act later on the path.

What merges tokens inside it is in `vtprune.stages.in_encoder`.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from vtprune.adapters.base import Adapter
from vtprune.callers import PerThread
from vtprune.devices import read
from vtprune.errors import ConfigError, UnsupportedStageError, VTPruneError
from vtprune.methods.base import InEncoder
from vtprune.methods.in_layers import InLayers
from vtprune.ops.attention import attention_received, attention_rows
from vtprune.signals import EncoderRecord, EncoderSignal
from vtprune.stages.choosing import Profile
from vtprune.stages.encode_kinds import EncodeKinds
from vtprune.stages.encoder_call import EncoderCall, bit_sum, with_tables_read
from vtprune.stages.hooks import Wrapped
from vtprune.stages.in_encoder import EncoderCut
from vtprune.stages.in_layers import TowerCut
from vtprune.tokens import Medium
from vtprune.transformers_private import EncoderScores, encoder_scores, is_rotated, query_key_projections

COMPUTED_ELSEWHERE = "the image features of this call were computed elsewhere; pass the pixels inside the session"


@dataclass
class _Seen:
    """What one thread encoded."""

    last: dict[str, EncoderCall] = field(default_factory=dict)
    """Kind -> the encoding computed last in this session."""
    open: EncoderCall | None = None
    """The one that is being computed."""
    projected: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Encoder layer -> projection -> its output, until the layer's attention has run."""


def _shares_rows(features: Tensor, known: Tensor) -> bool:
    return features.shape[1:] == known.shape[1:] and bool((known.to(features) == features[0]).all(-1).any())


class EncoderRecorder:
    """Records the last call of the vision encoder for images and for videos, in each thread.

    `generate()` encodes long before the language model runs, and only once for all beams. So the recorder keeps a call
    until the next one of the same kind. `get_image_features` is a method, not a module, and cannot be hooked: while the
    recorder is installed, an instance attribute of the base model shadows the method.
    """

    def __init__(
        self,
        adapter: Adapter,
        requests: Iterable[Hashable],
        methods: Sequence[InEncoder] = (),
        in_layers: Sequence[InLayers] = (),
        *,
        profile: Profile,
    ):
        """requests: what is taken down; methods: what acts between layers of the encoder; in_layers: what acts inside
        them."""
        self.adapter = adapter
        self._seen = PerThread(_Seen)
        self._kinds = EncodeKinds(adapter)
        self.cut = EncoderCut(adapter, methods, lambda: self._seen().open, profile=profile)
        self.in_layers = TowerCut(adapter, in_layers, lambda: self._seen().open, profile=profile)
        signals = [request for request in requests if isinstance(request, EncoderSignal)]
        taps = [signal.taps(adapter.shape) for signal in signals]
        self.cls_layers = {layer for tap in taps for layer in tap.cls_rows}
        self.received_layers = {layer for tap in taps for layer in tap.received}
        self.key_layers = {layer for tap in taps for layer in tap.keys}
        self.output_layers = {layer for tap in taps for layer in tap.outputs}
        self.keep_features = any(tap.projector_input for tap in taps)
        depth = adapter.shape.encoder_layers
        for layer in self.cls_layers | self.received_layers | self.key_layers | self.output_layers:
            if not 0 <= layer < depth:
                raise ConfigError(
                    f"a signal reads encoder layer {layer}, and the vision encoder has layers 0..{depth - 1}"
                )
        self.watched = self.cls_layers | self.received_layers | self.key_layers
        if self.watched:  # asked for now, so that it is an error before anything is computed
            query_key_projections(adapter.encoder_attention(adapter.encoder_layers()[0]))
        if in_layers and (self.watched or self.output_layers or methods):
            raise UnsupportedStageError(
                f"{in_layers[0].name} takes tokens away inside encoder layers, so no other method can read or merge "
                "there; methods that read the projected features, or act inside the LLM, work: mmtok, transprune"
            )
        needs = next((signal.needs_clip for signal in signals if signal.needs_clip), None)
        if needs and not adapter.has_clip_tower:
            raise UnsupportedStageError(
                f"{needs} needs a CLIP as vision encoder, and that of {adapter.family} is a "
                f"{adapter.vision_config.model_type}; leave text_tower out to compare in the LLM's space"
            )
        self._times = profile is True

    def install(self) -> Iterator[RemovableHandle | Wrapped]:
        """Yields what takes each hook off again, as soon as it is on."""
        kinds = self.adapter.visual_token_ids
        yield from self._kinds.install()
        for call, kind in self._kinds.calls.items():
            yield Wrapped(*call, self._encode(kind))
        if self.keep_features:
            yield self.adapter.projector.register_forward_pre_hook(self._before_projector, with_kwargs=True)
        # Hooks that read and never replace need no particular order; towers may be shared between kinds.
        hooked = self.watched or self.output_layers or self.cut.cuts or self.in_layers.methods
        towers = {id(self.adapter.vision_tower(kind)): kind for kind in kinds} if hooked else {}
        for kind in towers.values():
            layers = self.adapter.encoder_layers(kind)
            yield from self.cut.install(layers)
            yield from self.in_layers.install(kind)
            for index in self.watched:
                attention = self.adapter.encoder_attention(layers[index])
                for name in query_key_projections(attention):
                    yield getattr(attention, name).register_forward_hook(self._take_projection(index, name))
                yield attention.register_forward_hook(self._take_attention(index), with_kwargs=True)
            for index in self.output_layers:
                yield layers[index].register_forward_hook(self._take_output(index))

    @property
    def merges(self) -> bool:
        """Whether a method acts inside the encoder."""
        return bool(self.cut.cuts or self.in_layers.methods)

    @property
    def compact(self) -> bool:
        """Whether positions are renumbered where tokens went inside the encoder."""
        return self.cut.compact or any(method.positions == "compact" for method in self.in_layers.methods)

    def forget(self) -> None:
        """Forget what was computed, in every thread."""
        self._seen.clear()
        self._kinds.forget()

    @property
    def has_merged(self) -> bool:
        """Whether tokens were merged in what this thread encoded last."""
        return any(encoding.merge is not None for encoding in self._seen().last.values())

    def _encode(self, kind: str):
        def make(method):
            signature = inspect.signature(method)

            @functools.wraps(method)
            def encode(*args, **kwargs):
                seen = self._seen()
                if seen.open is not None:  # called by another one: Qwen3-VL encodes videos as images
                    return method(*args, **kwargs)
                started = clock(self.adapter.model) if self._times else 0.0
                arguments = signature.bind(*args, **kwargs).arguments
                seen.open = encoding = EncoderCall(self._kinds.of(kind, arguments), with_tables_read(arguments))
                seen.last.pop(encoding.kind, None)  # a call that fails leaves nothing behind
                try:
                    encoding.output = method(*args, **kwargs)
                finally:
                    seen.open = None
                    seen.projected.clear()
                if self._times:
                    encoding.seconds = clock(self.adapter.model) - started
                if not isinstance(encoding.output, tuple):  # which, on request, is nothing a model is fed with
                    encoding.pooled = self.adapter.features_of(encoding.output)
                    seen.last[encoding.kind] = encoding
                return encoding.output

            return encode

        return make

    def _before_projector(self, module, args, kwargs):
        if (encoding := self._seen().open) is not None:
            encoding.project((args or tuple(kwargs.values()))[0].detach())

    def _take_output(self, layer: int):
        def hook(module, args, output):
            if (encoding := self._seen().open) is not None:
                hidden = (output[0] if isinstance(output, tuple) else output).detach()
                hidden = hidden if hidden.ndim == 3 else hidden[None]  # packed: one sequence
                encoding.outputs[layer] = hidden.roll(1, 1) if self.adapter.cls_is_last else hidden

        return hook

    def _take_projection(self, layer: int, name: str):
        def hook(module, args, output):
            seen = self._seen()
            if seen.open is not None:
                seen.projected.setdefault(layer, {})[name] = output.detach()

        return hook

    def _take_attention(self, layer: int):
        def hook(module, args, kwargs, output):
            seen = self._seen()
            encoding = seen.open
            if encoding is None:
                return
            projected = seen.projected.pop(layer)
            merge = encoding.merge
            scattered = (lambda values: values) if merge is None else merge.scattered
            calls = self._scores(module, projected, args, kwargs)
            if layer in self.key_layers:
                plain = self._scores(module, projected, args, kwargs, rotated=False) if is_rotated(kwargs) else calls
                keys = [rearrange(call.keys, "b heads n d -> b n heads d") for call in plain]
                encoding.keys[layer] = scattered(torch.cat(keys, 1).flatten(2)).unflatten(2, keys[0].shape[2:])
            if layer not in self.cls_layers | self.received_layers:
                return
            calls = self._by_image(calls, encoding, layer)
            if layer in self.cls_layers:
                (call,) = calls  # CLS tokens are in front of their crops, so crops are not packed
                rows = attention_rows(call.queries[:, :, :1], call.keys, scale=call.scale, mask=call.visible(0, 1))
                encoding.rows[layer] = scattered(rows[:, :, 0].mT).mT
            if layer in self.received_layers:
                received = [
                    attention_received(
                        call.queries,
                        call.keys,
                        scale=call.scale,
                        mask=None if call.mask is None else call.visible,
                        valid=call.real,
                    )
                    for call in calls
                ]
                encoding.received[layer] = scattered(torch.cat(received, 1))

        return hook

    def _scores(self, *arguments, **options) -> list[EncoderScores]:
        """`encoder_scores` with a CLS token in front."""
        calls = encoder_scores(*arguments, **options)
        return [call.last_token_first() for call in calls] if self.adapter.cls_is_last else calls

    def _by_image(self, calls: list[EncoderScores], encoding: EncoderCall, layer: int) -> list[EncoderScores]:
        """The calls of a layer's attention function, of which none holds several images in one sequence.

        Raises VTPruneError if such a sequence cannot be split: attention would be shared out among other images.
        """
        whole = self.adapter.encoder_sequences(encoding.kind, encoding.inputs)
        lengths = [one if isinstance(one, int) else one[layer] for one in whole]
        if len(calls) > 1 or len(calls[0].queries) > 1 or len(lengths) < 2:
            return calls
        if sum(lengths) != calls[0].queries.shape[2]:
            raise VTPruneError(
                f"the adapter {type(self.adapter).__name__} states sequences of {sum(lengths)} patches, and the vision "
                f"encoder attends over {calls[0].queries.shape[2]} in one; override its `encoder_sequences`"
            )
        return calls[0].split(lengths)

    # -- what was encoded ---------------------------------------------------------------------------------------

    def encoding(self, kind: str, output: Any | None, placed: Tensor | None = None) -> EncoderCall:
        """The encoding that a call's features come from; `output` is what was handed in, None if computed within.
        placed: see `EncoderCall`.

        Raises UnsupportedStageError if the layout of its tokens cannot be told.
        """
        encoding = self._seen().last.get(kind)
        if output is not None and (encoding is None or encoding.output is not output):
            given = EncoderCall(kind, None, output, self.adapter.features_of(output))
            if encoding is None or not _shares_rows(given.features, encoding.features):
                return self._place_unseen(given)
            # `generate()` cuts features for chunked prefill, and then hands on nothing else of the encoder's output.
            # Copies of all of it come from wrappers that move arguments between devices.
            if output.last_hidden_state is None and encoding.output.last_hidden_state is not None:
                raise UnsupportedStageError("chunked prefill cannot be pruned; pass the whole prompt at once")
        if not encoding.media or encoding.placed is not placed:
            encoding.place(self.adapter.media(kind, encoding.inputs, encoding.pooled), placed)
        return encoding

    def _place_unseen(self, encoding: EncoderCall) -> EncoderCall:
        grid = self.adapter.image_grid if encoding.kind == "image" else None
        if grid is None or any(len(image) != len(grid) for image in encoding.pooled):
            raise UnsupportedStageError(f"the visual tokens cannot be told apart: {COMPUTED_ELSEWHERE}")
        encoding.media = [Medium.of_grids(grid) for _ in encoding.pooled]
        return encoding

    def projector_inputs(self, encodings: Iterable[EncoderCall]) -> Tensor:
        """(tokens of all encodings, dim): the encoder's feature of each visual token."""
        values = []
        for e in encodings:
            rows = self.adapter.projector_inputs(e.kind, e.inputs, e.projector_input)
            values.append(_fitting(self.adapter, "projector_inputs", rows, e))
        return torch.cat(values)

    def sequences(self, encoding: EncoderCall) -> list[int | tuple[int | tuple[int, int], ...]]:
        """Patches of every sequence that the encoder ran for an encoding; one number a layer if any were merged."""
        whole = self.adapter.encoder_sequences(encoding.kind, encoding.inputs)
        return whole if encoding.merge is None else encoding.merge.sequences(whole, self.adapter.shape)

    def copied_into(self, encodings: Iterable[EncoderCall]) -> tuple[Tensor, Tensor]:
        """`EncoderMerge.copied_into` for the tokens of all encodings, the encoder's tokens numbered through."""
        values, same, start = [], [], 0
        for e in encodings:
            if e.merge is None:
                into, own = torch.full((e.tokens,), -1), torch.ones(e.tokens, dtype=torch.bool)
            else:
                into, own = e.merge.copied_into()
                _fitting(self.adapter, "patch_values", into, e)
            values.append(torch.where(into >= 0, into + start, into))
            same.append(own)
            start += 0 if e.merge is None else e.merge.slots.numel()
        return torch.cat(values), torch.cat(same)

    def per_token(self, encodings: Iterable[EncoderCall], values: Callable[[EncoderRecord], Tensor]) -> Tensor:
        """(tokens of all encodings, dim): `values` of the encoder's tokens, (crops, tokens, dim) of each encoding."""
        return torch.cat([self._per_token(encoding, values(encoding)) for encoding in encodings])

    def _per_token(self, encoding: EncoderCall, values: Tensor) -> Tensor:
        """Values of the encoder's tokens (crops, tokens, dim), CLS included, as one row a visual token."""
        has_cls = self.adapter.shape.has_cls and self.adapter.cuts_cls(encoding.kind)
        rows = self.adapter.patch_values(encoding.kind, encoding.inputs, values[:, int(has_cls) :])
        return _fitting(self.adapter, "patch_values", rows, encoding)

    def image_keys(self, encoding: EncoderCall) -> list[int]:
        """One number a medium that depends on its pixels alone; zeros if they were not seen."""
        if encoding.inputs is None:
            return [0] * len(encoding.media)
        sums = read(*(bit_sum(pixels) for pixels in self.adapter.pixels(encoding.kind, encoding.inputs)))
        return [int(number) % 2**31 for number in sums]


def _fitting(adapter: Adapter, name: str, rows: Tensor, encoding: EncoderCall) -> Tensor:
    """What an adapter's method `name` made of the encoder's values, of the tokens in the prompt: (visual tokens, ...).

    Raises VTPruneError unless there is one row for each of so many visual tokens.
    """
    if len(rows) != encoding.encoded_tokens:
        raise VTPruneError(
            f"the adapter {type(adapter).__name__} gives {len(rows)} rows of encoder values for "
            f"{encoding.encoded_tokens} visual tokens; override its `{name}`, which says how patches become tokens"
        )
    return encoding.in_prompt(rows)


def clock(model) -> float:
    """Seconds, once everything queued on the model's device has run."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
