# SPDX-License-Identifier: Apache-2.0

import torch

from vtprune import DART
from vtprune.attention import LayerAttention
from vtprune.methods.dart import KeyNorms, NormedStates, key_norms
from vtprune.ops.pivot_tokens import leading, unlike_pivots
from vtprune.tokens import ModelShape

from . import Vector, handles, kept, one_group, row_context, same


@handles("dart_*")
def selection(v: Vector) -> None:
    state, keys, start, end = v["state"], v["keys"], v["start"], v["start"] + v["length"]
    image, text = slice(start, end), slice(end, None)
    # The recorded keys are already rotated.
    still = torch.ones(1, state.shape[1], keys.shape[-1])
    context = row_context((still, torch.zeros_like(still)), keys.shape[1], keys.shape[-1])
    norms = key_norms(LayerAttention(context, torch.clone, lambda: keys.transpose(1, 2).flatten(2)))

    def pivots(where: slice, count: int) -> torch.Tensor:
        index, real = leading(norms[:, where], torch.ones_like(norms[:, where], dtype=torch.bool), count)
        assert real.all()
        return index[0] + where.start

    by_image, by_text = pivots(image, v["pivot_image"]), pivots(text, v["pivot_text"])
    same(by_image, v["image_pivots"])
    same(by_text, v["text_pivots"])

    budget = len(v["kept_sorted"])
    chosen = torch.zeros(1, v["length"], dtype=torch.bool)
    chosen[0, by_image - start] = True
    keep = unlike_pivots(
        state[:, image],
        state[:, v["pivot_order"]],
        torch.ones(1, len(v["pivot_order"]), dtype=torch.bool),
        chosen,
        torch.ones_like(chosen),
        torch.tensor([budget]),
    )
    same(keep[0].nonzero()[:, 0] + start, v["kept_sorted"])

    # The method has another order of pivots; with a single pivot the order does not matter.
    method = DART(image_pivots=v["pivot_image"], text_pivots=v["pivot_text"])
    signals = {
        NormedStates(): (state[:, image], state[:, text]),
        KeyNorms(): (norms[:, image], norms[:, text]),
    }
    shape = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)
    own = kept(method, one_group(state[0, image], budget, signals, shape, layer=2)) + start
    assert len(own) == budget and set(by_image.tolist()) <= set(own.tolist())
    if len(v["pivot_order"]) == 1:
        same(own, v["kept_sorted"])
