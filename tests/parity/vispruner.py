# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune import VisPruner
from vtprune.signals import AttentionReceived, ClsAttention, EncoderFeatures
from vtprune.tokens import ModelShape

from . import Vector, handles, one_per_group


@handles("vispruner_*")
def selection(v: Vector) -> None:
    features, rows, k = v["features"], v["cls_attn"], v["k"]
    method = VisPruner(keep_tokens=k, important_ratio=v["important_ratio"])
    assert v["keep_mask"].nonzero()[:, 1].view(len(features), k).tolist() == v["keep_idx"].tolist()
    # The same without a CLS token, from the attention that tokens receive.
    for has_cls, request, attention in (
        (True, ClsAttention((22,)), rows[:, None]),
        (False, AttentionReceived(23), rows.mean(1)),
    ):
        shape = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=has_cls)
        assert method.signals(shape) == (request, EncoderFeatures())
        signals = {request: attention, EncoderFeatures(): features}
        tokens = one_per_group(torch.zeros(*features.shape[:2], 1), k, signals=signals, shape=shape)
        assert torch.equal(method.select(tokens).keep, v["keep_mask"])
