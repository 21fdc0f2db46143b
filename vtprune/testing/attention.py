# SPDX-License-Identifier: Apache-2.0
"""Attention that methods are shown, compared with what the model's own eager code computes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import vtprune
from vtprune.methods.base import Method
from vtprune.methods.fastv import FastV
from vtprune.signals import LastQueryAttention
from vtprune.testing.cases import Case, Refused, Result, compared, found, largest_difference
from vtprune.testing.recompute import encoded, visual_columns
from vtprune.transformers_private import attention_back_end

WEIGHTS, SHARE_OF_WEIGHTS = 1e-4, 0.2
"""Largest error of an attention weight: in float32 and float64; in shorter floats as a share of the largest weight."""


def attention_rows(case: Case, method: Method) -> Result:
    """The attention that FastV scores with, which is recomputed from queries and keys, is that of eager attention."""
    seen: dict[str, Tensor] = {}

    @dataclass(frozen=True, kw_only=True)
    class Spy(FastV):
        name: ClassVar[str] = method.name

        def scores(self, tokens):
            seen["rows"], seen["lengths"] = tokens[LastQueryAttention(tokens.layer - 1)].clone(), tokens.lengths
            return super().scores(tokens)

    spy = Spy(**dataclasses.asdict(method))
    with vtprune.prune(case.model, spy) as session:
        case.generate(case.batch.inputs)  # which counts positions without the padding
    layer = spy.cuts(session.adapter.shape)[0] - 1
    measured = largest = 0.0
    for sample, single in enumerate(case.batch.singles):
        columns = _content(case.model, session.adapter, single)
        expected = _eager_weights(case.model, session.adapter.decoder_layers[layer], single)[:, -1, columns]
        if len(columns) != (n := int(seen["lengths"][sample])):
            return found("failed", f"sample {sample} has {len(columns)} visual tokens, {n} were scored")
        measured = max(measured, largest_difference(seen["rows"][sample, :, :n], expected))
        largest = max(largest, expected.max().item())
    return compared(measured, WEIGHTS if case.is_exact else SHARE_OF_WEIGHTS * largest, f"decoder layer {layer}")


@torch.no_grad()
def _content(model, adapter: vtprune.Adapter, single: dict[str, Tensor]) -> Tensor:
    """Columns of a single prompt that hold visual tokens with content: no separators."""
    columns = visual_columns(model, single)[:0]
    for kind, own, arguments, output in encoded(model, single):
        media = adapter.media(kind, arguments, adapter.features_of(output))
        crops = torch.cat([medium.crops for medium in media]).to(own.device)
        columns = torch.cat([columns, own[crops >= 0]])
    return columns.sort().values


@torch.no_grad()
def _eager_weights(model, layer, single: dict[str, Tensor]) -> Tensor:
    """(heads, n, n) attention weights of a decoder layer for a single prompt, by the whole model's own eager code."""
    weights: list[Tensor] = []
    with eager(model):
        # Of this layer alone: those of all layers of a large model would not fit into memory.
        watch = layer.self_attn.register_forward_hook(lambda module, args, output: weights.append(output[1]))
        try:
            model(**single, use_cache=False)
        finally:
            watch.remove()
    if weights[0] is None:
        raise Refused("its eager attention gives no weights")
    return weights[0][0].float()


@contextlib.contextmanager
def eager(model) -> Iterator[None]:
    parts = [name for name in model.config.sub_configs if getattr(model.config, name, None) is not None]
    before = {name: attention_back_end(getattr(model.config, name)) for name in parts}
    before[""] = attention_back_end(model.config)
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
