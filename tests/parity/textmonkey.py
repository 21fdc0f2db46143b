# SPDX-License-Identifier: Apache-2.0
from vtprune import TextMonkey
from vtprune.ops.redundancy import similarity_to_later
from vtprune.tokens import ModelShape

from . import Vector, close, handles, kept, one_group, same

SHAPE = ModelShape(encoder_layers=48, decoder_layers=32, feature_layer=47, has_cls=False)


@handles("textmonkey_*")
def filtered(v: Vector) -> None:
    features, count = v["x"], v["r"]
    scores = similarity_to_later(features)
    close(scores, v["node_max"], rtol=1e-5, atol=1e-6)
    for group, expected, out in zip(features, v["keep_idx"], v["out"], strict=True):
        places = kept(TextMonkey(keep_tokens=count), one_group(group, count, {}, SHAPE))
        same(places, expected)
        close(group[places], out)
