# SPDX-License-Identifier: Apache-2.0
"""AuroraCap's layers merge as in ToMe, without proportional attention: what it adds to the logits cancels."""

from vtprune import AuroraCap
from vtprune.ops.soft_matching import soft_matching

from . import Vector, close, handles, same
from .encoder_blocks import timm_blocks
from .encoder_sessions import run_in_session


@handles("auroracap_layers")
def layers(v: Vector) -> None:
    x, sizes = v["x_in"], None
    for index, block in enumerate(timm_blocks(v)):
        x, keys = block.attend(x)
        reduction = soft_matching(keys.mean(1), v["r"], sizes=sizes, protected=1)
        x, sizes = block.feed_forward(reduction.features(x)), reduction.sizes(sizes)
        close(x, v[f"x_out.{index}"], rtol=1e-5, atol=1e-5)
        same(sizes, v[f"size.{index}"])
    run_in_session(v, AuroraCap(r=v["r"]))
