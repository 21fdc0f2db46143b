# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from vtprune import PruMerge, PruMergePlus
from vtprune.methods.prumerge import WideAttention
from vtprune.ops.outlier_merging import one_wide_head
from vtprune.ops.outliers import above_quartiles
from vtprune.signals import EncoderKeys
from vtprune.tokens import ModelShape

from . import Vector, close, handles, one_per_group, same

SHAPE = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)


def attention_of(v: Vector) -> Tensor:
    """(batch, patches) from the attention of four heads, which is what an encoder gives."""
    queries, keys = (t.unflatten(-1, (4, -1)) for t in (v["q_cls"], v["keys"]))
    rows = torch.einsum("bhd,bnhd->bhn", queries, keys).div(keys.shape[-1] ** 0.5).softmax(-1)
    return one_wide_head(rows)[:, 1:]


@handles("prumerge_*")
def merging(v: Vector) -> None:
    attention = attention_of(v)
    close(attention, v["cls_attn"], rtol=1e-4)
    joint = v["adaptive"] and len(attention) > 1
    if v["adaptive"]:
        marked = above_quartiles(attention.flatten()[None]) if joint else above_quartiles(attention)
        share = marked.float().mean().item()
        assert abs(share - v["ratio"]) < 1e-6
    kept = v["keep_idx"].shape[1]
    # The quartiles of a whole batch give one count for all; here each crop has its own.
    budget = -1 if v["adaptive"] and not joint else kept + 1
    method = (PruMergePlus if v["plus"] else PruMerge)(neighbours=v["neighbours"], reference_quirks=True)
    signals = {WideAttention(23): v["cls_attn"], EncoderKeys(23): v["keys"][:, 1:]}
    selection = method.select(one_per_group(v["features"], budget, signals=signals, shape=SHAPE))
    for group, expected in enumerate(v["keep_idx"]):
        keep = selection.keep[group].clone()
        rest = int(selection.sources[group].masked_fill(keep, -1).max())
        keep[rest] = False
        same(keep.nonzero()[:, 0], expected.sort().values)
        order = v["order"][group]
        out = torch.cat((selection.features[group, order], selection.features[group, rest][None]))
        close(out, v["out"][group], rtol=2e-4, atol=2e-5)
