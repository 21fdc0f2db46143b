# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune import FasterVLM
from vtprune.ops.cls_attention import cls_score
from vtprune.signals import ClsAttention
from vtprune.tokens import ModelShape

from . import Vector, close, handles, kept, one_group, same

SHAPE = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)


@handles("fastervlm_*")
def selection(v: Vector) -> None:
    rows, k = v["cls_attn"][:, None], v["k"]
    close(cls_score(rows), v["score"])
    method = FasterVLM(keep_tokens=k)
    assert method.signals(SHAPE) == (ClsAttention((22,)),)
    features = torch.zeros(rows.shape[-1], 1)
    chosen = kept(method, one_group(features, k, {ClsAttention((22,)): rows}, SHAPE))
    same(chosen, v["keep_idx"][0])
    same(torch.zeros_like(v["keep_mask"][0]).index_fill_(0, chosen, True), v["keep_mask"][0])
