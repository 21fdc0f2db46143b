# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune import FasterVLM
from vtprune.signals import EncoderSaliency
from vtprune.tokens import ModelShape

from . import Vector, close, handles, kept, one_group, read, same

SHAPE = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)


@handles("fastervlm_*")
def selection(v: Vector) -> None:
    k = v["k"]
    attention = read(EncoderSaliency(22), SHAPE, rows={22: v["cls_attn"]})
    close(attention, v["score"])
    method = FasterVLM(keep_tokens=k)
    assert method.signals(SHAPE) == (EncoderSaliency(22),)
    features = torch.zeros(attention.shape[-1], 1)
    chosen = kept(method, one_group(features, k, {EncoderSaliency(22): attention}, SHAPE))
    same(chosen, v["keep_idx"][0])
    same(torch.zeros_like(v["keep_mask"][0]).index_fill_(0, chosen, True), v["keep_mask"][0])
