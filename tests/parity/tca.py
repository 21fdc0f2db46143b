# SPDX-License-Identifier: Apache-2.0
"""TCA: recorded blocks inside an open_clip encoder, run in a session, and recorded streams."""

from unittest import mock

import open_clip
import torch
from torch import Tensor

import vtprune
from vtprune.adaptation import AnchoredTCA
from vtprune.methods import tca
from vtprune.ops.condensation import condensation, condensation_counts, coreset
from vtprune.ops.reservoir import Reservoir, nearest_anchor

from . import Vector, close, handles, same


@handles("tca_block*")
def block(v: Vector) -> None:
    """The block is the second layer, behind one that changes nothing: no layer before the first has anchors."""
    x, weights = v["x"].transpose(0, 1), v.weights()
    dim, hidden = x.shape[2], len(weights["mlp.c_fc.bias"])
    model = open_clip.transformer.VisionTransformer(
        image_size=8, patch_size=4, width=dim, layers=2, heads=v["heads"], mlp_ratio=hidden / dim, output_dim=dim,
        act_layer=open_clip.transformer.QuickGELU,
    )  # fmt: skip
    model.eval()
    layers = model.transformer.resblocks
    for last in (layers[0].attn.out_proj, layers[0].mlp.c_proj):
        for parameter in last.parameters():
            torch.nn.init.zeros_(parameter)
    layers[1].load_state_dict(weights)
    layers[1].ln_1.eps = layers[1].ln_2.eps = v["ln_eps"]

    anchors = torch.zeros(len(v["anchors"]), 2, dim)
    anchors[:, 0] = v["anchors"]
    if len(anchors):
        same(nearest_anchor(anchors[:, 0], x[:, 0]), v["anchors"][v["anchor_choice"]])
    method = AnchoredTCA(drop_rate=v["drop_rate"], layers=(1,), anchors=anchors if len(anchors) else None)
    reductions = []

    def with_start(features: Tensor, attention: Tensor, rate: float, *, protected: int):
        close(features, v["x_after_attn"].transpose(0, 1), rtol=1e-5, atol=1e-5)
        close(attention[:, 1:], v["cls_attn_mean"], rtol=1e-5, atol=1e-6)
        reductions.append(condensation(features, attention, rate, start=v["kcenter_start"], protected=protected))
        rows = reductions[0].features(features)
        close(rows[:, v["n_kept"] + 1 : -1], v["merged_tokens"].transpose(0, 1), rtol=1e-5, atol=1e-5)
        return reductions[0]

    # The reference draws the first centre at random.
    with (
        torch.no_grad(),
        mock.patch.object(tca, "condensation", with_start),
        vtprune.prune(model, method) as session,
    ):
        out = model.transformer(x)
    close(out, v["x_out"].transpose(0, 1), rtol=1e-5, atol=1e-5)
    assert session.report.entered == (x.shape[1], x.shape[1] + bool(len(anchors)))

    (reduction,) = reductions
    stay, clustered, dropped = condensation_counts(x.shape[1] - 1, v["drop_rate"])
    assert (stay, clustered, stay + clustered) == (v["n_kept"], 2 * v["merged_count"], v["left_tokens"])
    patches, last = reduction.into[:, 1:], reduction.rows - 1
    same(patches.gather(1, v["kept_idx_desc"]), torch.arange(1, stay + 1).expand(len(x), -1))
    in_clusters = patches.gather(1, v["cluster_idx_desc"])
    assert ((in_clusters > stay) & (in_clusters < last)).all()
    same((patches == last).nonzero()[:, 1].view(-1, dropped), v["dropped_idx_asc"])


@handles("tca_coreset*")
def clusters(v: Vector) -> None:
    tokens, count = v["tokens"][None], v["num_centers"]
    means = coreset(tokens, count, torch.tensor([v["start"]]))
    same(means.into[0], v["assignment"])
    same(means.into[0, v["center_idx"]], torch.arange(count))
    close(means.features(tokens)[0], v["merged"], rtol=1e-5, atol=1e-5)


@handles("tca_reservoir*")
def stream(v: Vector) -> None:
    cls, entropies, predictions = v["cls_tokens"], v["losses"], v["preds"]
    options = dict(scale=v["scale"], beta=v["beta"], strength=v["lambd"])
    reservoir, whole = (Reservoir(v["num_classes"], v["reservoir_size"], *cls.shape[1:]) for _ in range(2))
    for step in range(len(cls)):
        now = slice(step, step + 1)
        correction = reservoir.observe(cls[now], entropies[now], predictions[now], **options)
        close(correction[0], v["logit_correction"][step], rtol=1e-5, atol=1e-5)
        assert (reservoir.anchors() is not None) == v["anchor_active"][step]
    close(reservoir.anchors(), v["anchors"], rtol=1e-5, atol=1e-6)
    for kept, samples in zip(reservoir.cls, v["final_content"], strict=True):
        same(kept[samples >= 0], cls[samples[samples >= 0]])
    # All samples in one batch: the same.
    same(whole.observe(cls, entropies, predictions, **options)[-1], correction[0])
