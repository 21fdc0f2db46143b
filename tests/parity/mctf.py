# SPDX-License-Identifier: Apache-2.0
from vtprune.ops.multi_criteria_fusion import fused_attention, fusion, fusion_count

from . import Vector, close, handles, same

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
