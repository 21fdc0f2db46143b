# SPDX-License-Identifier: Apache-2.0
"""What the last prefill kept, where, and what that saved. Every number is measured, none is configured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vtprune import cost
from vtprune.report_table import HEADER, row
from vtprune.transformers_private import layer_type


@dataclass(frozen=True)
class LayerRange:
    """Decoder layers `start`..`end`-1, which all hold the same columns."""

    start: int
    end: int
    kept: tuple[Tensor, ...]
    """A sample each: (kept,) long, ascending columns of `input_ids`."""
    merged_into: tuple[Tensor, ...]
    """A sample each: (visual tokens,) long, the column every visual token went into, -1 if dropped."""
    masked: tuple[Tensor, ...] = ()
    """A sample each: (m,) long, columns of visual tokens that are hidden from these layers, but computed and
    cached all the same. Empty without any."""

    @property
    def present(self) -> tuple[Tensor, ...]:
        """A sample each: ascending columns of the visual tokens that these layers compute."""
        if not self.masked:
            return self.kept
        return tuple(torch.cat(both).sort().values for both in zip(self.kept, self.masked, strict=True))


@dataclass(frozen=True)
class Timings:
    """Seconds of the last prefill; measured only with `profile=True`."""

    encoder: float
    selector: float
    prefill: float
    """Language model, selection inside it included."""


@dataclass(frozen=True)
class Report:
    """The last prefill of a session, and what became of its KV cache since.

    Columns count from the start of `input_ids`, padding included; on a kept cache, from its start.
    With beams or several returned sequences, one sample stands for all copies of its prompt.
    """

    model_name: str
    methods: tuple[str, ...]
    layer_ranges: tuple[LayerRange, ...]
    visual: tuple[Tensor, ...]
    """A sample each: columns of all its visual tokens."""
    text_tokens: tuple[int, ...]
    """A sample each: real tokens of its prompt that are not visual."""
    text_config: Any
    vision_config: Any
    encoder_has_cls: bool
    encoder_gated_mlp: bool
    """Whether an MLP of the vision encoder has three matrices instead of two."""
    encoder_mlp_width: int | None
    """Width inside an MLP of the vision encoder; None if `vision_config` says it."""
    encoder_sequences: tuple[int | tuple[int | tuple[int, int], ...], ...]
    """Patches of each sequence (image, tile or frame) that the vision encoder ran for this prefill; one number a layer
    where tokens were merged between layers, and two (of its attention and of its MLP) where they went inside layers."""
    kv_dtype_bytes: int
    encoder_uncounted: str = ""
    """Why FLOPs of the vision encoder are not counted, as a clause; empty: they are."""
    timings: Timings | None = None
    selection_flops: int | None = None
    """FLOPs of choosing tokens for the whole batch, two for each multiply-add of matrix products, as torch's
    `FlopCounterMode` counts them (without fused attention on a CPU); None unless `profile="flops"`. Choices in the
    vision encoder count, those before the LLM and inside it, and eviction after the prefill. What a method reads counts
    where it is computed for the choice, as rows of the LLM's attention are. What hooks note on the way, as attention in
    the encoder, does not. Copies of a prompt count each."""
    notes: tuple[str, ...] = ()
    """Which method "auto" chose and why; what methods read instead of what their papers name, e.g. on an
    encoder without a CLS token."""
    in_cache: tuple[tuple[Tensor, ...], ...] | None = None
    """A decoder layer each, a sample each: ascending columns of the visual tokens in the KV cache; None while these are
    the ones that the prefill kept."""
    auxiliary_bytes: int = 0
    """Bytes of hidden states that are kept for tokens that may come back."""

    @property
    def depth(self) -> int:
        """Decoder layers."""
        return self.layer_ranges[-1].end

    @property
    def samples(self) -> int:
        return len(self.visual)

    @cached_property
    def counts(self) -> Tensor:
        """(samples, layers) long: visual tokens that enter each decoder layer, and are seen there."""
        return self._by_layer([s.kept for s in self.layer_ranges])

    @cached_property
    def _computed(self) -> Tensor:
        """(samples, layers) long: the same, and what is masked."""
        return self._by_layer([s.present for s in self.layer_ranges])

    def _by_layer(self, columns: list[tuple[Tensor, ...]]) -> Tensor:
        ranges = zip(self.layer_ranges, columns, strict=True)
        return torch.cat(
            [torch.tensor([*map(len, alive)])[:, None].expand(-1, s.end - s.start) for s, alive in ranges], 1
        )

    @property
    def original_tokens(self) -> list[int]:
        """A sample each: visual tokens of its prompt."""
        return [len(columns) for columns in self.visual]

    @property
    def final_tokens(self) -> list[int]:
        """A sample each: visual tokens alive in the last layer."""
        return self.counts[:, -1].tolist()

    @property
    def keep_ratio(self) -> float:
        """Visual tokens seen, averaged over layers and samples, over what the unpruned model would see.

        1.0 without any.
        """
        total = sum(self.original_tokens) * self.depth
        return float(self.counts.sum()) / total if total else 1.0

    def _layer_range(self, sample: int, layer: int) -> LayerRange:
        depth = self.depth
        if not -self.samples <= sample < self.samples or not -depth <= layer < depth:
            raise IndexError(f"sample {sample}, layer {layer}: the report has {self.samples} samples, {depth} layers")
        layer %= depth
        return next(s for s in self.layer_ranges if s.start <= layer < s.end)

    def kept(self, sample: int, layer: int = -1) -> Tensor:
        """(kept,) long: ascending columns of `input_ids` of the visual tokens alive in a layer.

        For merged tokens: of their representative.
        """
        return self._layer_range(sample, layer).kept[sample]

    def sources(self, sample: int, layer: int = -1) -> Tensor:
        """(visual tokens,) long: for every visual token the index in `kept` it went into, -1 if dropped."""
        layer_range = self._layer_range(sample, layer)
        kept, merged_into = layer_range.kept[sample], layer_range.merged_into[sample]
        if not len(kept):
            return torch.full_like(merged_into, -1)
        index = torch.searchsorted(kept, merged_into.clamp(min=0)).clamp(max=len(kept) - 1)
        return index.masked_fill(merged_into < 0, -1)

    def cached(self, sample: int, layer: int = -1) -> Tensor:
        """(tokens,) long: ascending columns of the visual tokens whose keys and values a layer holds now.

        Those of `kept`, less what was evicted after the prefill, and with what came back while decoding or is masked.
        """
        return (
            self._layer_range(sample, layer).present[sample] if self.in_cache is None else self.in_cache[layer][sample]
        )

    @cached_property
    def kv_lengths(self) -> Tensor:
        """(samples, layers) long: tokens of the prompt, text included, whose keys and values each layer holds now.

        In layers with a sliding window at most what the next token can see.
        """
        if self.in_cache is None:
            return self._kv_lengths(self._computed.tolist())
        return self._kv_lengths([[len(layer[sample]) for layer in self.in_cache] for sample in range(self.samples)])

    # -- cost ---------------------------------------------------------------------------------------------------

    def _flops(self, counts: list[list[int]]) -> tuple[float, ...]:
        pairs = zip(counts, self.text_tokens, strict=True)
        return tuple(float(cost.llm_prefill_flops(self.text_config, row, text)) for row, text in pairs)

    @property
    def _unpruned_counts(self) -> list[list[int]]:
        return [[n] * self.depth for n in self.original_tokens]

    @cached_property
    def sample_prefill_flops(self) -> tuple[float, ...]:
        """A sample each: FLOPs of the language model's prefill (convention "exact" of `vtprune.cost`)."""
        return self._flops(self._computed.tolist())

    @cached_property
    def sample_unpruned_prefill_flops(self) -> tuple[float, ...]:
        """The same had nothing been pruned."""
        return self._flops(self._unpruned_counts)

    @property
    def prefill_flops(self) -> float:
        """FLOPs of the language model's prefill, summed over the samples."""
        return sum(self.sample_prefill_flops)

    @property
    def unpruned_prefill_flops(self) -> float:
        """The same had nothing been pruned."""
        return sum(self.sample_unpruned_prefill_flops)

    @cached_property
    def encoder_flops(self) -> float | None:
        """FLOPs of the vision encoder for the whole batch; zero if it did not run in this session.

        None of an encoder whose FLOPs are not counted, see `encoder_uncounted`.
        """
        if self.encoder_uncounted:
            return None
        mlp: dict[str, Any] = {"gated_mlp": self.encoder_gated_mlp, "mlp_width": self.encoder_mlp_width}
        sequences, has_cls = self.encoder_sequences, self.encoder_has_cls
        return float(cost.encoder_flops(self.vision_config, sequences, has_cls=has_cls, **mlp))

    def _kv_lengths(self, counts: list[list[int]]) -> Tensor:
        config = self.text_config
        lengths = torch.tensor(counts) + torch.tensor(self.text_tokens)[:, None]
        for layer in range(self.depth):
            if layer_type(config, layer) == "sliding_attention":  # it forgets what the next token cannot see
                lengths[:, layer].clamp_(max=config.sliding_window - 1)
        return lengths

    def _kv_bytes(self, lengths: Tensor) -> tuple[int, ...]:
        return tuple(int(cost.kv_bytes(self.text_config, row, self.kv_dtype_bytes)) for row in lengths.tolist())

    @cached_property
    def sample_kv_bytes(self) -> tuple[int, ...]:
        """A sample each: bytes of keys and values of `kv_lengths`, summed over layers."""
        return self._kv_bytes(self.kv_lengths)

    @cached_property
    def sample_unpruned_kv_bytes(self) -> tuple[int, ...]:
        """The same had nothing been pruned."""
        return self._kv_bytes(self._kv_lengths(self._unpruned_counts))

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of `kv_lengths`, summed over layers and samples."""
        return sum(self.sample_kv_bytes)

    @property
    def unpruned_kv_bytes(self) -> int:
        """The same had nothing been pruned."""
        return sum(self.sample_unpruned_kv_bytes)

    # -- views --------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "model": self.model_name,
            "methods": list(self.methods),
            "notes": list(self.notes),
            "samples": self.samples,
            "layers": self.depth,
            "original_tokens": self.original_tokens,
            "final_tokens": self.final_tokens,
            "counts": self.counts.tolist(),
            "keep_ratio": self.keep_ratio,
            "text_tokens": list(self.text_tokens),
            "prefill_flops": self.prefill_flops,
            "unpruned_prefill_flops": self.unpruned_prefill_flops,
            "encoder_flops": self.encoder_flops,
            "selection_flops": self.selection_flops,
            "sample_prefill_flops": list(self.sample_prefill_flops),
            "sample_unpruned_prefill_flops": list(self.sample_unpruned_prefill_flops),
            "sample_kv_bytes": list(self.sample_kv_bytes),
            "sample_unpruned_kv_bytes": list(self.sample_unpruned_kv_bytes),
            "kv_lengths": self.kv_lengths.tolist(),
            "kv_bytes": self.kv_bytes,
            "unpruned_kv_bytes": self.unpruned_kv_bytes,
            "auxiliary_bytes": self.auxiliary_bytes,
            "kept": [self.kept(sample).tolist() for sample in range(self.samples)],
            "timings": None if self.timings is None else vars(self.timings),
        }

    def __str__(self) -> str:
        original, depth = sum(self.original_tokens), self.depth
        lines = [
            f"vtprune {' + '.join(self.methods)} on {self.model_name}: {self.samples} sample(s), {depth} layers",
            HEADER,
            row("visual tokens, final", sum(self.final_tokens), original),
            row("visual tokens, average", float(self.counts.sum()) / depth, original),
            row("prefill GFLOPs", self.prefill_flops / 1e9, self.unpruned_prefill_flops / 1e9),
            row("KV cache MB", self.kv_bytes / 1e6, self.unpruned_kv_bytes / 1e6),
        ]
        if self.selection_flops is not None:
            lines.insert(-1, row("selection GFLOPs", self.selection_flops / 1e9, 0.0))
        if len(self.layer_ranges) > 1:
            counts = (f"from {s.start}: {sum(map(len, s.kept))}" for s in self.layer_ranges)
            lines.append(f"  visual tokens by layer    {', '.join(counts)}")
        if self.in_cache is not None:
            lines.append(f"  cached tokens by layer    {', '.join(map(str, self.kv_lengths.sum(0).tolist()))}")
        if self.auxiliary_bytes:
            lines.append(f"  kept for revival          {self.auxiliary_bytes / 1e6:.4g} MB")
        lines += (f"  note                      {note}" for note in self.notes)
        if self.encoder_uncounted:
            lines.append(f"  note                      FLOPs of the encoder are not counted: {self.encoder_uncounted}")
        if self.timings is not None:
            t = self.timings
            lines.append(
                f"  milliseconds              encoder {t.encoder * 1e3:.1f}, selector {t.selector * 1e3:.1f}, "
                f"prefill {t.prefill * 1e3:.1f}"
            )
        return "\n".join(lines)

    __repr__ = __str__  # what a notebook shows of the last line of a cell
