# SPDX-License-Identifier: Apache-2.0
from vtprune import MCTF
from vtprune.ops.multi_criteria_fusion import fused_attention, fusion, fusion_count

from . import Vector, close, handles, same
from .encoder_blocks import timm_blocks
from .encoder_sessions import run_in_session

POOLING = ("size", "importance", "max", "mean")


@handles("mctf_n*", "mctf_unidir*", "mctf_pool*", "mctf_tau*")
def fused(v: Vector) -> None:
    features, attention, protected = v["x"], v["attn"], v["num_protected"]
    has_sizes = "size" in v
    sizes = v["size"] if has_sizes else None
    reduction = fusion(
        features,
        attention.mean(dim=(1, 2)),
        fusion_count(features.shape[1], v["r"], protected=protected),
        sizes=sizes,
        tau_similarity=v["tau_sim"],
        tau_information=v["tau_info"],
        tau_size=v["tau_size"],
        bidirectional=bool(v["bidirection"]),
        pooling=POOLING[v["pooling_type"]],
        protected=protected,
    )
    same(reduction.into, v["group_of_token"])
    close(reduction.features(features), v["x_out"], rtol=1e-5, atol=1e-5)
    close(reduction.sizes(sizes), v["size_out"], rtol=1e-6)
    if "attn_next" in v:
        close(fused_attention(attention, reduction), v["attn_next"], rtol=1e-5, atol=1e-6)


@handles("mctf_blocks*")
def blocks(v: Vector) -> None:
    """Fusing before the attention, which is fused, too (1) or computed again (2), or behind the block (0)."""
    x, sizes, sources = v["x_in"], None, None
    for index, block in enumerate(timm_blocks(v)):
        if index not in v["activate_layers"]:
            x, _ = block.attend(x)
            x = block.feed_forward(x)
            close(x, v[f"x_out.{index}"], rtol=1e-5, atol=1e-5)
            continue
        attention = block.probabilities(*block.heads_of(x)[:2], sizes)
        if v["one_step_ahead"] == 0:
            x = block.feed_forward(block.attend(x, sizes)[0])
        count = fusion_count(x.shape[1], v["r"])
        reduction = fusion(x, attention.mean(dim=(1, 2)), count, sizes=sizes)
        x, sizes, sources = reduction.features(x), reduction.sizes(sizes), reduction.trace(sources)
        if v["one_step_ahead"] == 1:
            x = x + block.projected(fused_attention(attention, reduction) @ block.heads_of(x)[2])
            x = block.feed_forward(x)
        elif v["one_step_ahead"] == 2:
            x = block.feed_forward(block.attend(x, sizes)[0])
        close(x, v[f"x_out.{index}"], rtol=1e-5, atol=1e-5)
        same(sizes, v[f"size.{index}"])
    same(sources, v["group_of_token"])
    layers = tuple(v["activate_layers"].tolist())
    run_in_session(v, MCTF(r=v["r"], layers=layers, one_step_ahead=v["one_step_ahead"]))
