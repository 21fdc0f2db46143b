# SPDX-License-Identifier: Apache-2.0

import torch
from torch import Tensor

from vtprune import SparseVLM
from vtprune.methods.sparsevlm import RaterAttention
from vtprune.ops.density_peaks import density_peak_order, density_peaks, merge_clusters, scaled_distances
from vtprune.ops.text_raters import text_raters
from vtprune.ops.token_recycling import recycle_dropped, recycling_counts
from vtprune.tokens import ModelShape

from . import Vector, close, handles, one_group, rotary, row_context, same

SHAPE = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)


def by_noise(v: Vector, noise: str, n: int) -> Tensor:
    """Order of the first n points. Of equally dense points the one with more noise comes first."""
    return v[noise][0, :n].argsort(descending=True)


@handles("sparsevlm_cm*")
def clusters(v: Vector) -> None:
    points, count = v["x"][0], v["cluster_num"]
    points = points[by_noise(v, "noise", len(points))]
    centres, assigned = density_peaks(points, count, count, reference_quirks=True)
    order = density_peak_order(scaled_distances(points), count, count, reference_quirks=True)
    rank = torch.searchsorted(centres, order)
    close(merge_clusters(points, centres, assigned, centre_weight=None)[rank], v["out"][0], rtol=2e-5, atol=2e-6)


@handles("sparsevlm_v15_*", "sparsevlm_v20_*")
def stages(v: Vector) -> None:
    pre, n, length = v["pre_len"], v["n_visual"], v["embeds"].shape[1]
    merges = v["version"] < 2
    image, text = v["embeds"][:, pre : pre + n], v["embeds"][:, pre + n :]
    raters = text_raters(image, text, *(torch.ones(x.shape[:2], dtype=torch.bool) for x in (image, text)))
    same(raters[0].nonzero()[:, 0], v["raters"])

    plus = {"recycle": 0, "undo_rotation": True, "heads": 14, "positions": "original"}
    method = SparseVLM() if merges else SparseVLM(**plus)
    positions = torch.arange(length)
    for stage in range(3):
        weights = v[f"s{stage}_text_rows"]
        if not merges:
            context = row_context(rotary(positions, 16, 10000.0), heads=1, head_dim=16)
            rows = v["raters"] + len(positions) - v["n_text"]
            weights = weights / context.position_logits(rows[None])[:, None]
        visual = slice(pre, pre + n)
        (request,) = method.signals(SHAPE)
        assert request == RaterAttention(not merges)
        hidden, left = v[f"s{stage}_hidden"], v[f"s{stage}_n_visual_after"]
        signals = {request: weights.mean(2)[..., visual]}
        tokens = one_group(hidden[0, visual], left, signals, SHAPE, layer=stage + 1)
        scores = method.scores(tokens)[0]
        # Some logits are near zero, so dividing by them makes the last bits of a weight count more.
        close(scores, v[f"s{stage}_score"][0], **({} if merges else {"rtol": 1e-4, "atol": 1e-5}))
        keep, best = method.select(tokens).keep[0], v[f"s{stage}_keep_mask"][0]
        assert int(keep.sum()) == left and bool(keep[best].all())
        features = hidden[0, visual]
        if merges:
            kept, pooled, _ = recycling_counts(n, left, method.recycle)
            pool = scores.argsort(descending=True)[kept : kept + pooled]
            scores[pool[by_noise(v, f"s{stage}_noise", pooled)]] = scores[pool]
            keep, features, _ = recycle_dropped(features, scores, left, method.recycle)
        check(v, stage, hidden[0], pre, n, best, keep, features)
        if merges:
            positions = torch.arange(len(positions) - n + left)
        else:
            alive = torch.ones(len(positions), dtype=torch.bool)
            alive[visual] = best
            positions = positions[alive]
        same(positions, v[f"s{stage}_position_ids"][0])
        n = left


def check(
    v: Vector, stage: int, hidden: Tensor, pre: int, n: int, best: Tensor, keep: Tensor, features: Tensor
) -> None:
    """The new sequence, in which the reference puts merged tokens behind all others, best centre first."""
    out, count, end = v[f"s{stage}_out"][0], int(best.sum()), pre + int(keep.sum())
    same(out[:pre], hidden[:pre])
    same(out[pre : pre + count], features[best])
    same(out[end:], hidden[pre + n :])
    merged, expected = features[keep & ~best], out[pre + count : end]
    close(merged[merged[:, 0].argsort()], expected[expected[:, 0].argsort()], rtol=1e-4, atol=1e-5)
