# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor
from torch.nn.functional import linear

from vtprune import VisionZip
from vtprune.ops.attention import attention_rows
from vtprune.signals import EncoderKeys, EncoderSaliency
from vtprune.tokens import ModelShape

from . import Vector, close, handles, one_per_group, read, same
from .layouts import mosaic_order

SHAPE = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)


@handles("visionzip_d*", "visionzip_odd49", "visionzip_c1")
def through_the_method(v: Vector) -> None:
    """The reference counts the CLS token and puts it first; contextual tokens come last."""
    attention, hidden, metric = v["cls_attn"], v["hidden"], v["metric"][:, 1:]
    dominant, contextual = v["dominant"] - 1, v["contextual"]
    budget = dominant + contextual
    signals = {
        EncoderSaliency(22): read(EncoderSaliency(22), SHAPE, rows={22: attention}),
        EncoderKeys(22, heads="mean"): metric,
    }
    tokens = one_per_group(hidden[:, 1:], budget, signals=signals, shape=SHAPE)
    method = VisionZip(keep_tokens=budget, contextual_share=contextual / budget, reference_quirks=True)
    sane = VisionZip(keep_tokens=budget, contextual_share=contextual / budget).select(tokens)
    selection = method.select(tokens)
    assert torch.equal(selection.keep, sane.keep) and torch.equal(selection.sources, sane.sources)
    for group, features in enumerate(selection.features):
        keep = selection.keep[group]
        assert int(keep.sum()) == budget
        chosen = v["all_indices_sorted"][group, 1:] - 1
        assert bool(keep[chosen].all())
        others = keep.index_fill(0, chosen, False)
        close(torch.cat((hidden[group, :1], features[chosen], features[others])), v["out"][group], atol=1e-6)
        for place in others.nonzero()[:, 0].tolist():
            members = hidden[group, 1:][sane.sources[group] == place]
            close(sane.features[group, place], members.mean(0), rtol=1e-4, atol=1e-6)


@handles("visionzip_keymetric")
def attention_and_keys(v: Vector) -> None:
    queries, keys = (linear(v["x"], v[f"{name}_w"], v[f"{name}_b"]) for name in "qk")
    queries, keys = (t.unflatten(-1, (v["heads"], -1)) for t in (queries, keys))
    close(read(EncoderKeys(22, heads="mean"), SHAPE, keys={22: keys}), v["metric"], rtol=1e-4, atol=1e-6)
    queries, keys = queries.transpose(1, 2), keys.transpose(1, 2)
    rows = attention_rows(queries[:, :, :1], keys, scale=keys.shape[-1] ** -0.5)
    close(rows[:, :, 0, 1:], v["cls_attn"], rtol=1e-4, atol=1e-6)


@handles("visionzip_anyres")
def tiles(v: Vector) -> None:
    """Dominant patches in the order of the mosaic, as here; then the tokens that the reference puts after them."""
    features, patches = v["tile_features"], v["all_indices"].sort(1).values[:, 1:] - 1
    crops = torch.arange(1, len(features) + 1)[:, None].expand_as(patches).flatten()
    order = mosaic_order(crops, patches.flatten(), v["grid_w"], 24)
    count = patches.shape[1]
    parts: tuple[Tensor, ...] = (features[:, 1 : count + 1], features[:, :1], features[:, count + 1 :])
    patched, cls, contextual = (part.flatten(0, 1) for part in parts)
    same(torch.cat((patched[order], cls, contextual)), v["out"])
