# SPDX-License-Identifier: Apache-2.0
"""The vision encoder: watches what it computes for each image or video, for methods that act later on the path.

What merges tokens inside it is in `vtprune.stages.in_encoder`.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtprune.adapters.base import Adapter
from vtprune.callers import PerThread
from vtprune.errors import UnsupportedStageError, VTPruneError
from vtprune.methods.base import InEncoder
from vtprune.ops.attention import attention_received, attention_rows
from vtprune.ops.similarity import similarity_to
from vtprune.signals import (
    AttentionReceived,
    ClsAttention,
    ClsSimilarity,
    EncoderFeatures,
    EncoderKeys,
    EncoderOutput,
    JointSpace,
)
from vtprune.stages.in_encoder import EncoderCut, EncoderMerge
from vtprune.tokens import Medium

CLIP = "clip_vision_model"
"""What configs of CLIP's vision tower call themselves."""

COMPUTED_ELSEWHERE = "the image features of this call were computed elsewhere; pass the pixels inside the session"


@dataclass
class Encoding:
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
    """The projector's input; only if asked for."""
    rows: dict[int, Tensor] = field(default_factory=dict)
    """Encoder layer -> (crops, heads, tokens), the CLS query's attention; only for the layers asked for."""
    received: dict[int, Tensor] = field(default_factory=dict)
    """Encoder layer -> (crops, tokens), the mean attention each token receives; only for the layers asked for."""
    keys: dict[int, Tensor] = field(default_factory=dict)
    """Encoder layer -> (crops, tokens, heads * head dim); only for the layers asked for."""
    merge: EncoderMerge | None = None
    """What was merged inside the encoder; None if nothing was to be."""
    outputs: dict[int, Tensor] = field(default_factory=dict)
    """Encoder layer -> (crops, tokens, dim), what it put out; only for the layers asked for."""
    seconds: float = 0.0

    @property
    def features(self) -> Tensor:
        """(tokens of all media, dim): what goes to the language model."""
        pooled = self.pooled
        return pooled.flatten(0, -2) if torch.is_tensor(pooled) else torch.cat([f.flatten(0, -2) for f in pooled])

    @property
    def tokens(self) -> int:
        """Visual tokens of all media."""
        return sum(map(len, self.media))


@dataclass
class _Seen:
    """What one thread encoded."""

    last: dict[str, Encoding] = field(default_factory=dict)
    """Kind -> the encoding computed last in this session."""
    open: Encoding | None = None
    """The one that is being computed."""
    queries: dict[int, Tensor] = field(default_factory=dict)
    """Encoder layer -> its queries, until its keys arrive."""


def _pooled(output: Any) -> Tensor | tuple[Tensor, ...]:
    pooled = output.pooler_output
    return pooled if torch.is_tensor(pooled) else tuple(pooled)


def _shares_rows(features: Tensor, known: Tensor) -> bool:
    return features.shape[1:] == known.shape[1:] and bool((known.to(features) == features[0]).all(-1).any())


class EncoderTap:
    """Keeps the encodings that each thread computed last, one a kind, and what their projector and CLS tokens saw.

    `generate()` encodes long before the language model runs, and only once for all beams, so the tap remembers until
    the next call of the same kind. The encode methods are no modules: while the tap is installed, a wrapper of the
    bound method stands in the base model's own `__dict__` and hides the class's.
    """

    def __init__(
        self, adapter: Adapter, requests: Iterable[Hashable], methods: Sequence[InEncoder] = (), *, profile: bool
    ):
        """requests: what is taken down; methods: what acts inside the encoder."""
        self.adapter = adapter
        self._seen = PerThread(_Seen)
        self.cut = EncoderCut(adapter, methods, lambda: self._seen().open)
        requests = list(requests)
        self.cls_layers = {layer for r in requests if isinstance(r, ClsAttention) for layer in r.layers}
        self.received_layers = {r.layer for r in requests if isinstance(r, AttentionReceived)}
        self.key_layers = {r.layer for r in requests if isinstance(r, EncoderKeys)}
        self.output_layers = {r.layer for r in requests if isinstance(r, EncoderOutput)}
        if any(isinstance(r, ClsSimilarity) for r in requests):
            self.output_layers.add(adapter.shape.feature_layer)
        self.keep_features = any(isinstance(r, EncoderFeatures) for r in requests)
        if self.received_layers | self.key_layers and not adapter.plain_encoder_attention:
            raise UnsupportedStageError(
                f"this method needs the attention inside the vision encoder, which cannot be recomputed for "
                f"{adapter.family} (packed images, or queries and keys of one projection); methods that need none: "
                "mmtok, divprune, fastv, transprune"
            )
        of_clip = any(isinstance(r, JointSpace) or (isinstance(r, EncoderOutput) and r.normalised) for r in requests)
        if of_clip and adapter.vision_config.model_type != CLIP:
            raise UnsupportedStageError(
                f"a text tower needs a CLIP as vision encoder, and that of {adapter.family} is a "
                f"{adapter.vision_config.model_type}; leave text_tower out to compare in the LLM's space"
            )
        self.profile = profile

    def install(self) -> Iterator[RemovableHandle | _Wrapped]:
        """Yields what takes each hook off again, as soon as it is on."""
        kinds = self.adapter.visual_token_ids
        for kind in kinds:
            yield _Wrapped(self.adapter.base, f"get_{kind}_features", self._encode(kind))
        if self.keep_features:
            yield self.adapter.projector.register_forward_pre_hook(self._before_projector)
        # Hooks that read and never replace need no particular order; towers may be shared between kinds.
        watched = self.cls_layers | self.received_layers | self.key_layers
        taps = watched or self.output_layers or self.cut.cuts
        towers = {id(self.adapter.vision_tower(kind)): kind for kind in kinds} if taps else {}
        for kind in towers.values():
            layers = self.adapter.encoder_layers(kind)
            yield from self.cut.install(layers)
            for index in watched:
                attention = self.adapter.encoder_attention(layers[index])
                yield attention.q_proj.register_forward_hook(self._take_queries(index))
                yield attention.k_proj.register_forward_hook(self._take_attention(index, attention))
            for index in self.output_layers:
                yield layers[index].register_forward_hook(self._take_output(index))

    def forget(self) -> None:
        """Forget what was computed, in every thread."""
        self._seen.clear()

    def _encode(self, kind: str):
        def make(method):
            signature = inspect.signature(method)

            @functools.wraps(method)
            def encode(*args, **kwargs):
                seen = self._seen()
                if seen.open is not None:  # called by another one: Qwen3-VL encodes videos as images
                    return method(*args, **kwargs)
                started = clock(self.adapter.model) if self.profile else 0.0
                # A call that fails leaves nothing behind.
                seen.last.pop(kind, None)
                seen.open = encoding = Encoding(kind, signature.bind(*args, **kwargs).arguments)
                try:
                    encoding.output = method(*args, **kwargs)
                finally:
                    seen.open = None
                    seen.queries.clear()
                if self.profile:
                    encoding.seconds = clock(self.adapter.model) - started
                if hasattr(encoding.output, "pooler_output"):  # a tuple, on request, is nothing a model is fed with
                    encoding.pooled = _pooled(encoding.output)
                    seen.last[kind] = encoding
                return encoding.output

            return encode

        return make

    def _before_projector(self, module, args):
        if (encoding := self._seen().open) is not None:
            encoding.projector_input = args[0].detach()

    def _take_output(self, layer: int):
        def hook(module, args, output):
            if (encoding := self._seen().open) is not None:
                encoding.outputs[layer] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    def _take_queries(self, layer: int):
        def hook(module, args, output):
            seen = self._seen()
            if seen.open is not None:
                seen.queries[layer] = (output if layer in self.received_layers else output[:, :1]).detach()

        return hook

    def _take_attention(self, layer: int, attention: nn.Module):
        def hook(module, args, output):
            seen = self._seen()
            encoding = seen.open
            if encoding is None:
                return
            query, key = seen.queries.pop(layer), output.detach()
            # Some towers normalise queries and keys over all heads together.
            if (norm := getattr(attention, "q_norm", None)) is not None:
                query = norm(query)
            if (norm := getattr(attention, "k_norm", None)) is not None:
                key = norm(key)
            merge = encoding.merge
            valid = None if merge is None else merge.padding
            dealt = (lambda values: values) if merge is None else merge.dealt
            if layer in self.key_layers:
                encoding.keys[layer] = dealt(key)
            heads = self.adapter.vision_config.num_attention_heads
            query, key = (rearrange(t, "b n (h d) -> b h n d", h=heads) for t in (query, key))
            scale = query.shape[-1] ** -0.5
            seen = None if valid is None else valid.to(key.device)[:, None, None]
            if layer in self.cls_layers:
                rows = attention_rows(query[:, :, :1], key, scale=scale, mask=seen)[:, :, 0]
                encoding.rows[layer] = dealt(rows.mT).mT
            if layer in self.received_layers:
                mask = None if seen is None else lambda first, last: seen
                received = attention_received(query, key, scale=scale, mask=mask, valid=valid)
                encoding.received[layer] = dealt(received)

        return hook

    # -- what was encoded ---------------------------------------------------------------------------------------

    def encoding(self, kind: str, output: Any | None) -> Encoding:
        """The encoding that a call's features come from; `output` is what was handed in, None if computed within.

        Raises UnsupportedStageError if the layout of its tokens cannot be told.
        """
        encoding = self._seen().last.get(kind)
        if output is not None and (encoding is None or encoding.output is not output):
            given = Encoding(kind, None, output, _pooled(output))
            if encoding is None or not _shares_rows(given.features, encoding.features):
                return self._place_unseen(given)
            # `generate()` cuts features for chunked prefill, and then hands on nothing else of the encoder's output.
            # Copies of all of it come from wrappers that move arguments between devices.
            if output.last_hidden_state is None and encoding.output.last_hidden_state is not None:
                raise UnsupportedStageError("chunked prefill cannot be pruned; pass the whole prompt at once")
        if not encoding.media:
            encoding.media = self.adapter.media(kind, encoding.inputs, encoding.pooled)
        return encoding

    def _place_unseen(self, encoding: Encoding) -> Encoding:
        grid = self.adapter.image_grid if encoding.kind == "image" else None
        if grid is None or any(len(image) != len(grid) for image in encoding.pooled):
            raise UnsupportedStageError(f"the visual tokens cannot be told apart: {COMPUTED_ELSEWHERE}")
        encoding.media = [Medium.of_grids(grid) for _ in encoding.pooled]
        return encoding

    def projector_inputs(self, encodings: Iterable[Encoding]) -> Tensor:
        """(tokens of all encodings, dim): the encoder's feature of each visual token."""
        values = []
        for e in encodings:
            rows = self.adapter.projector_inputs(e.kind, e.inputs, e.projector_input)
            values.append(_fitting(self.adapter, "projector_inputs", rows, e.tokens))
        return torch.cat(values)

    def sequences(self, encoding: Encoding) -> list[int | tuple[int, ...]]:
        """Patches of every sequence that the encoder ran for an encoding; one number a layer if any were merged."""
        whole = self.adapter.encoder_sequences(encoding.kind, encoding.inputs)
        if encoding.merge is None or not encoding.merge.lengths:
            return whole
        shape, rows = self.adapter.shape, []
        for crop, patches in enumerate(whole):
            row = [patches] * shape.encoder_layers
            for layer, lengths in encoding.merge.lengths:
                left = int(lengths[crop]) - int(shape.has_cls)
                row[layer + 1 :] = [left] * (shape.encoder_layers - layer - 1)
            rows.append(tuple(row))
        return rows

    def destinies(self, encodings: Iterable[Encoding]) -> tuple[Tensor, Tensor]:
        """`EncoderMerge.destinies` for the tokens of all encodings, the encoder's tokens numbered through."""
        values, same, start = [], [], 0
        for e in encodings:
            if e.merge is None:
                into, own = torch.full((e.tokens,), -1), torch.ones(e.tokens, dtype=torch.bool)
            else:
                into, own = e.merge.destinies()
                _fitting(self.adapter, "patch_values", into, e.tokens)
            values.append(torch.where(into >= 0, into + start, into))
            same.append(own)
            start += 0 if e.merge is None else e.merge.slots.numel()
        return torch.cat(values), torch.cat(same)

    def cls_rows(self, encodings: Iterable[Encoding], layers: Sequence[int]) -> Tensor:
        """(tokens of all encodings, layers, heads): what the CLS query pays to each visual token."""
        values = []
        for e in encodings:
            rows = torch.stack([e.rows[layer].to(e.rows[layers[0]].device) for layer in layers], 1)
            patches = rows[..., 1:] if self.adapter.cuts_cls(e.kind) else rows
            flat = rearrange(patches, "crops layers heads patches -> crops patches (layers heads)")
            flat = _fitting(self.adapter, "patch_values", self.adapter.patch_values(e.kind, e.inputs, flat), e.tokens)
            values.append(rearrange(flat, "tokens (layers heads) -> tokens layers heads", layers=len(layers)))
        return torch.cat(values)

    def attention_received(self, encodings: Iterable[Encoding], layer: int) -> Tensor:
        """(tokens of all encodings,): see `AttentionReceived`."""
        return torch.cat([self._per_token(e, e.received[layer][..., None]) for e in encodings])[:, 0]

    def encoder_keys(self, encodings: Iterable[Encoding], layer: int) -> Tensor:
        """(tokens of all encodings, heads * head dim): see `EncoderKeys`."""
        return torch.cat([self._per_token(e, e.keys[layer]) for e in encodings])

    def encoder_output(self, encodings: Iterable[Encoding], request: EncoderOutput) -> Tensor:
        """(tokens of all encodings, dim): see `EncoderOutput`."""
        values = []
        for e in encodings:
            output = e.outputs[request.layer]
            if request.normalised:
                output = self.adapter.vision_tower(e.kind).post_layernorm(output)
            values.append(self._per_token(e, output))
        return torch.cat(values)

    def cls_similarity(self, encodings: Iterable[Encoding], request: ClsSimilarity) -> Tensor:
        """(tokens of all encodings,): see `ClsSimilarity`."""
        values = []
        for e in encodings:
            output = e.outputs[self.adapter.shape.feature_layer]
            similarity = similarity_to(output[:, 0], output, request.metric)
            values.append(self._per_token(e, similarity[..., None]))
        return torch.cat(values)[:, 0]

    def _per_token(self, encoding: Encoding, values: Tensor) -> Tensor:
        """Values of the encoder's tokens (crops, tokens, dim), CLS included, as one row a visual token."""
        has_cls = self.adapter.shape.has_cls and self.adapter.cuts_cls(encoding.kind)
        rows = self.adapter.patch_values(encoding.kind, encoding.inputs, values[:, int(has_cls) :])
        return _fitting(self.adapter, "patch_values", rows, encoding.tokens)

    def image_keys(self, encoding: Encoding) -> list[int]:
        """One number a medium that depends on its pixels alone; zeros if they were not seen."""
        if encoding.inputs is None:
            return [0] * len(encoding.media)
        return [_bit_sum(pixels) for pixels in self.adapter.pixels(encoding.kind, encoding.inputs)]


def _fitting(adapter: Adapter, name: str, rows: Tensor, tokens: int) -> Tensor:
    """What an adapter's method `name` made of the encoder's values: (visual tokens, ...).

    Raises VTPruneError unless there is one row for each of so many visual tokens.
    """
    if len(rows) != tokens:
        raise VTPruneError(
            f"the adapter {type(adapter).__name__} gives {len(rows)} rows of encoder values for {tokens} visual "
            f"tokens; override its `{name}`, which says how patches become visual tokens"
        )
    return rows


def _bit_sum(pixels: Tensor) -> int:
    # A sum of bit patterns is exact: it does not depend on how a batch is laid out or a device adds up.
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[pixels.element_size()]
    return int(pixels.contiguous().view(bits).sum(dtype=torch.int64)) % 2**31


class _Wrapped:
    """A method of one object, wrapped until `remove`."""

    def __init__(self, owner: nn.Module, name: str, wrap):
        self.owner, self.name = owner, name
        self.before = owner.__dict__.get(name)
        setattr(owner, name, wrap(getattr(owner, name)))

    def remove(self) -> None:
        if self.before is None:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


def clock(model) -> float:
    """Seconds, once everything queued on the model's device has run."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
