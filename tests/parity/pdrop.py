# SPDX-License-Identifier: Apache-2.0

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from vtprune import PyramidDrop
from vtprune.attention import decoder_attention_rows
from vtprune.tokens import ModelShape

from . import Vector, handles, kept, one_group, rotary, row_context, same


@handles("pdrop_*")
def stage(v: Vector) -> None:
    ratios, index = v["ratios"].tolist(), v["stage"]
    method = PyramidDrop(layers=tuple(range(1, len(ratios))), schedule=tuple(ratios[1:]))
    assert method.positions == "compact"
    shape = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)
    width = v["out"].shape[1]
    for sample, mask in enumerate(v["attention_mask"]):
        length, start, original = int(mask.sum()), int(v["image_start"][sample]), int(v["image_tokens"][sample])
        features, after = v["features"][sample, :length], torch.arange(length)
        if start >= 0:
            n = length - int(v["prompt_len"][sample])
            assert n == int(original * ratios[index])
            counts = method.budgets(shape, torch.tensor([original]), torch.tensor([1]))
            image = slice(start, start + n)
            (request,) = method.signals(shape)
            weights = last_row(v, features, v["position_ids"][sample, :length])[None, image]
            tokens = one_group(features[image], int(counts[index, 0]), {request: weights}, shape, layer=index + 1)
            chosen = kept(method, tokens) + start
            after = torch.cat((after[:start], chosen, after[image.stop :]))
        # Shorter samples are padded on the right in the reference; here each runs alone.
        same(v["out_mask"][sample].nonzero()[:, 0], torch.arange(len(after)))
        same(v["out"][sample, : len(after)], features[after])
        same(v["out_position_ids"][sample], torch.arange(width).masked_fill(~v["out_mask"][sample], 0))


def last_row(v: Vector, features: Tensor, positions: Tensor) -> Tensor:
    """(tokens,) attention of the last token, averaged over heads; features (tokens, dim)."""
    length, dim = features.shape
    head_dim = dim // v["heads"]
    context = row_context(rotary(positions, head_dim, 10000.0), v["heads"], head_dim)
    normed = rms_norm(features, (dim,), v["norm_w"], 1e-6)[None]
    queries, keys = linear(normed[:, -1:], v["q_w"]), linear(normed, v["k_w"])
    return decoder_attention_rows(queries, keys, torch.tensor([[length - 1]]), context).mean(1)[0, 0]
