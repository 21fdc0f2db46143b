# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace

import torch

from vtprune import ToMe
from vtprune.ops.soft_matching import kth_matching, layer_counts, soft_matching

from . import Vector, close, handles, same
from .encoder_blocks import timm_blocks
from .encoder_sessions import run_in_session


@handles(*(f"tome_{name}" for name in ("cls*", "nocls*", "dist*", "odd*")))
def matching(v: Vector) -> None:
    protected = int(v["class_token"]) + int(v["distill_token"])
    reduction = soft_matching(v["metric"], v["r"], protected=protected)
    same(reduction.into, v["group_of_token"])
    close(reduction.features(v["x"]), v["merged_x"], rtol=1e-5, atol=1e-5)
    sizes = reduction.sizes()
    same(sizes, v["merged_size"])

    # Recorded: the even tokens that merged, the odd tokens that they went into, and the other even tokens.
    even, odd, unmerged = reduction.into[:, ::2], reduction.into[:, 1::2], v["unm_idx"].shape[1]
    same(even.gather(1, v["src_idx"]), odd.gather(1, v["dst_idx"]))
    own_rows = even.gather(1, v["unm_idx"])
    same(own_rows, own_rows.sort(dim=1).values)
    rows = v["merged_x"]
    if protected == 2:
        # The reference's inverse forgets that the distillation token, an odd one, was put behind the CLS token.
        rows = torch.cat(
            [rows[:, :1], rows[:, unmerged : unmerged + 1], rows[:, 1:unmerged], rows[:, unmerged + 1 :]], 1
        )
    close(reduction.spread(rows), v["unmerged_x"], rtol=1e-5, atol=1e-5)

    if "metric2" in v:
        second = soft_matching(v["metric2"], v["r2"], sizes=sizes, protected=protected)
        close(second.features(v["merged_x"]), v["merged_x2"], rtol=1e-5, atol=1e-5)
        same(second.sizes(sizes), v["merged_size2"])
        same(second.trace(reduction.trace()), v["group_of_token2"])


@handles("tome_kth*")
def every_kth(v: Vector) -> None:
    reduction = kth_matching(v["metric"], v["k"], reference_quirks=True)
    close(reduction.features(v["x"]), v["merged_mean"], rtol=1e-5, atol=1e-5)
    unmerged = v["unmerged"]
    close(reduction.spread(v["merged_mean"])[:, : unmerged.shape[1]], unmerged, rtol=1e-5, atol=1e-5)
    assert (reduction.into[:, unmerged.shape[1] :] == -1).all()


@handles("tome_reduce_modes")
def modes(v: Vector) -> None:
    reduction = soft_matching(v["metric"], v["r"], protected=int(v["class_token"]))
    close(reduction.features(v["x"]), v["mean"], rtol=1e-5, atol=1e-5)
    close(reduction.sums(v["x"]), v["sum"], rtol=1e-5, atol=1e-5)
    same(replace(reduction, pooling="max").features(v["x"]), v["amax"])


@handles("tome_parse_r")
def schedule(v: Vector) -> None:
    for layers, r, counts in json.loads(v["json"]):
        r = tuple(json.loads(f"[{r[1:-1]}]")) if r.startswith("(") else json.loads(r)
        assert layer_counts(layers, r) == counts


@handles("tome_blocks*")
def blocks(v: Vector) -> None:
    protected = int(v["class_token"])
    x, sizes, sources = v["x_in"], None, None
    for index, (block, r) in enumerate(zip(timm_blocks(v), v["r_per_layer"].tolist(), strict=True)):
        x, keys = block.attend(x, sizes if v["prop_attn"] else None)
        reduction = soft_matching(keys.mean(1), r, sizes=sizes, protected=protected)
        if reduction is not None:
            x, sizes, sources = reduction.features(x), reduction.sizes(sizes), reduction.trace(sources)
        x = block.feed_forward(x)
        close(x, v[f"x_out.{index}"], rtol=1e-5, atol=1e-5)
        same(sizes, v[f"size.{index}"])
    same(sources, v["group_of_token"])
    run_in_session(v, ToMe(r=v["r_per_layer"].tolist(), prop_attn=bool(v["prop_attn"])), class_token=bool(protected))
