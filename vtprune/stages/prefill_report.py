# SPDX-License-Identifier: Apache-2.0
"""Makes the report of a prefill from the state of its call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtprune.adapters.base import Adapter
from vtprune.methods.base import Method
from vtprune.methods.in_layers import InLayers
from vtprune.report import LayerRange, Report, Timings
from vtprune.signals import EncoderSignal
from vtprune.stages.call import Call
from vtprune.stages.encoder import EncoderRecorder
from vtprune.tokens import ModelShape


def substitutes(methods: Sequence[Method], shape: ModelShape) -> tuple[str, ...]:
    """What methods read on a model of this shape instead of what their papers name, for `Report.notes`."""
    signals = [
        (method.name, signal) for method in methods for part in method.parts(shape) for signal in part.signals(shape)
    ]
    notes = (
        f"{name}: {note}"
        for name, signal in signals
        if isinstance(signal, EncoderSignal) and (note := signal.substitute(shape)) is not None
    )
    return tuple(dict.fromkeys(notes))


def prefill_report(
    call: Call,
    recorder: EncoderRecorder,
    methods: Sequence[Method],
    notes: tuple[str, ...],
    *,
    timings: Timings | None,
    selection_flops: int | None,
) -> Report:
    """What a call that carried visual tokens kept, and where. notes: see `substitutes`."""
    rows = range(0, call.batch, call.media.copies)
    whole = call.media.visual
    visual = [whole[row].nonzero()[:, 0] for row in rows]
    ends = [*call.starts[1:], len(call.adapter.decoder_layers)]
    layer_ranges = tuple(
        LayerRange(
            start,
            end,
            tuple((s.columns[row][s.visual[row]] + call.past).cpu() for row in rows),
            tuple(
                torch.where(merged_into >= 0, merged_into + call.past, -1).cpu()
                for merged_into in (s.merged_into[row][columns] for row, columns in zip(rows, visual, strict=True))
            ),
            () if s.masked is None else tuple((s.columns[row][s.masked[row]] + call.past).cpu() for row in rows),
        )
        for start, end, s in zip(call.starts, ends, call.sequence_layouts, strict=True)
    )
    sequences = tuple(
        patches
        for encoding in call.media.encodings
        if encoding.inputs is not None
        for patches in recorder.sequences(encoding)
    )
    return _report(
        call.adapter,
        methods,
        call.embeddings,
        layer_ranges=layer_ranges,
        visual=tuple((columns + call.past).cpu() for columns in visual),
        text_tokens=tuple(int((call.prompt[row] & ~whole[row]).sum()) for row in rows),
        encoder_sequences=sequences,
        notes=notes,
        timings=timings,
        selection_flops=selection_flops,
    )


def asks_for_everything(method: Method, call: Call) -> bool:
    """Whether a method is asked to drop nothing of a call, also by a count that no image exceeds."""
    crops = call.media.crops_per_sample.clamp(min=1)
    content = (call.media.labels >= 0).sum(1)
    if isinstance(method, InLayers):  # its schedule may be empty, and visual tokens may be made of several patches
        merges = [encoding.merge for encoding in call.media.encodings]
        return not any(merge is not None and bool((merge.copies >= 0).any()) for merge in merges)
    return method.keep_ratio == 1.0 or (
        method.keep_tokens is not None and bool((method.keep_tokens * crops >= content).all())
    )


def text_report(
    adapter: Adapter,
    methods: Sequence[Method],
    notes: tuple[str, ...],
    hidden: Tensor,
    mask: Any,
    *,
    selection_flops: int | None,
) -> Report:
    """A prompt without visual tokens; hidden (batch, length, dim) enters the language model under a 2D mask, or any."""
    lengths = mask.sum(1).tolist() if torch.is_tensor(mask) and mask.ndim == 2 else [hidden.shape[1]] * len(hidden)
    empty = (torch.empty(0, dtype=torch.long),) * len(hidden)
    return _report(
        adapter,
        methods,
        hidden,
        layer_ranges=(LayerRange(0, len(adapter.decoder_layers), empty, empty),),
        visual=empty,
        text_tokens=tuple(int(length) for length in lengths),
        encoder_sequences=(),
        notes=notes,
        selection_flops=selection_flops,
    )


def _report(adapter: Adapter, methods: Sequence[Method], hidden: Tensor, **counted: Any) -> Report:
    return Report(
        model_name=type(adapter.model).__name__,
        methods=tuple(method.name for method in methods),
        text_config=adapter.text_config,
        vision_config=adapter.vision_config,
        encoder_has_cls=adapter.has_cls,
        encoder_gated_mlp=adapter.gated_encoder_mlp,
        encoder_uncounted=adapter.encoder_uncounted,
        encoder_mlp_width=adapter.encoder_mlp_width,
        kv_dtype_bytes=hidden.element_size(),
        **counted,
    )
