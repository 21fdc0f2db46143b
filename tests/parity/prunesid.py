# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune import PruneSID
from vtprune.ops.principal_groups import component_counts, loadings, mean_likeness, without_likes
from vtprune.ops.token_pairs import directions_of
from vtprune.signals import EncoderFeatures, EncoderSaliency
from vtprune.tokens import ModelShape

from . import Vector, close, handles, one_per_group, same

CLIP = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)
QWEN = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=False)


def steps(v: Vector, features, scores, total: int, k: int) -> None:
    """Groups, suppression and counts one by one; scores None: the loadings."""
    valid = torch.ones(features.shape[:2], dtype=torch.bool)
    lengths = valid.sum(1)
    weights = loadings(features, lengths, torch.full_like(lengths, v["groups"]))
    loading, belong = weights.max(2)
    assert belong.tolist() == v["belong"].view(belong.shape).tolist()
    threshold = torch.as_tensor(v["threshold"]).view(-1).float()
    ranks = without_likes(
        directions_of(features, valid), loading if scores is None else scores, belong, valid, threshold, v["groups"]
    )
    for key, values in zip(("group_counts", "nms_counts"), ranks[1:], strict=True):
        assert values.tolist() == v[key].view(values.shape).tolist()
    counts = [component_counts(*each, k, total) for each in zip(ranks[1].tolist(), ranks[2].tolist(), strict=True)]
    assert counts == v["group_tokens"].view(len(counts), -1).tolist()


@handles("prunesid_llava*", "prunesid_odd*", "prunesid_n*", "prunesid_partial*")
def with_cls(v: Vector) -> None:
    features, attention, total = v["hidden"][:, 1:], v["cls_attn"].mean(1), v["need"]
    likeness = mean_likeness(
        directions_of(features, torch.ones(features.shape[:2], dtype=torch.bool)), torch.tensor([features.shape[1]])
    )
    close(likeness, torch.as_tensor(v["sim_mean"]).view(-1), rtol=1e-4)
    close(likeness * total / 32, torch.as_tensor(v["threshold"]).view(-1), rtol=1e-4)
    steps(v, features, attention, total, total - 1)
    signals = {EncoderFeatures(): features, EncoderSaliency(22): attention}
    tokens = one_per_group(features, total - 1, signals=signals, shape=CLIP)
    keep = PruneSID(keep_tokens=total - 1).select(tokens).keep
    for group, expected in enumerate(v["keep_idx"]):
        same(keep[group].nonzero()[:, 0], expected)


@handles("prunesid_qwen*")
def without_cls(v: Vector) -> None:
    features, total = v["features"][None], v["need_scaled"]
    if "belong" in v:
        steps(v, features, None, total, total)
    tokens = one_per_group(features, total, signals={}, shape=QWEN)
    same(PruneSID(keep_tokens=total).select(tokens).keep[0].nonzero()[:, 0], v["keep_idx"].sort().values)
