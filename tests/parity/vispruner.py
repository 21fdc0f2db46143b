# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune import VisPruner
from vtprune.signals import EncoderFeatures, EncoderSaliency
from vtprune.tokens import ModelShape

from . import Vector, handles, one_per_group, read


@handles("vispruner_*")
def selection(v: Vector) -> None:
    features, rows, k = v["features"], v["cls_attn"], v["k"]
    method = VisPruner(keep_tokens=k, important_ratio=v["important_ratio"])
    assert v["keep_mask"].nonzero()[:, 1].view(len(features), k).tolist() == v["keep_idx"].tolist()
    # The same without a CLS token, from the attention that tokens receive.
    for has_cls, layer, record in ((True, 22, {"rows": rows}), (False, 23, {"received": rows.mean(1)})):
        shape = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=has_cls)
        saliency = EncoderSaliency(layer)
        assert method.signals(shape) == (saliency, EncoderFeatures())
        attention = read(saliency, shape, **{name: {layer: values} for name, values in record.items()})
        signals = {saliency: attention, EncoderFeatures(): features}
        tokens = one_per_group(torch.zeros(*features.shape[:2], 1), k, signals=signals, shape=shape)
        assert torch.equal(method.select(tokens).keep, v["keep_mask"])
