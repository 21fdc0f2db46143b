# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune.ops.condensation import condensation, condensation_counts, coreset
from vtprune.ops.reservoir import Reservoir, nearest_anchor

from . import Vector, close, handles, same
from .encoder_blocks import Block, quick_gelu

NAMES = {
    "ln_": "norm",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj": "attn.proj",
    "c_fc": "fc1",
    "c_proj": "fc2",
}


@handles("tca_block*")
def block(v: Vector) -> None:
    weights = {}
    for name, weight in v.weights().items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        weights[name] = weight
    layer = Block(weights, v["heads"], v["ln_eps"], quick_gelu)
    x, anchors = v["x"].transpose(0, 1), v["anchors"]
    attended = x
    if len(anchors):
        anchor = nearest_anchor(anchors, x[:, 0])
        same(anchor, anchors[v["anchor_choice"]])
        attended = torch.cat([anchor[:, None], x], dim=1)
    first = attended.shape[1] - x.shape[1]
    attention = layer.probabilities(*layer.heads_of(attended)[:2])[:, :, first, first:].mean(1)
    close(attention[:, 1:], v["cls_attn_mean"], rtol=1e-5, atol=1e-6)
    x = layer.attend(attended)[0][:, first:]
    close(x, v["x_after_attn"].transpose(0, 1), rtol=1e-5, atol=1e-5)

    stay, clustered, dropped = condensation_counts(x.shape[1] - 1, v["drop_rate"])
    assert (stay, clustered, stay + clustered) == (v["n_kept"], 2 * v["merged_count"], v["left_tokens"])
    reduction = condensation(x, attention, v["drop_rate"], start=v["kcenter_start"])
    patches, last = reduction.into[:, 1:], reduction.rows - 1
    same(patches.gather(1, v["kept_idx_desc"]), torch.arange(1, stay + 1).expand(len(x), -1))
    in_clusters = patches.gather(1, v["cluster_idx_desc"])
    assert ((in_clusters > stay) & (in_clusters < last)).all()
    same((patches == last).nonzero()[:, 1].view(-1, dropped), v["dropped_idx_asc"])
    rows = reduction.features(x)
    close(rows[:, stay + 1 : -1], v["merged_tokens"].transpose(0, 1), rtol=1e-5, atol=1e-5)
    close(layer.feed_forward(rows), v["x_out"].transpose(0, 1), rtol=1e-5, atol=1e-5)


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
