# SPDX-License-Identifier: Apache-2.0
import torch
from torch.nn.functional import normalize

from vtprune import SCOPE
from vtprune.ops.attention import attention_rows
from vtprune.ops.coverage import greedy_cover
from vtprune.signals import EncoderSaliency
from vtprune.tokens import ModelShape

from . import Vector, close, handles, one_per_group, same

SHAPE = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)


def covers_of(features: torch.Tensor) -> torch.Tensor:
    directions = normalize(features, dim=-1)
    return (directions @ directions.T).clamp_min(0)


@handles("scope_n*", "scope_odd*", "scope_k*", "scope_alpha*", "scope_llava*")
def selection(v: Vector) -> None:
    features = v["features"]
    saliency = v["saliency"] if "saliency" in v else torch.ones(features.shape[:2])
    for group, expected in enumerate(v["order"]):
        order, _ = greedy_cover(covers_of(features[group]), saliency[group] ** v["alpha"], v["k"])
        same(order, expected)
    tokens = one_per_group(features, v["k"], signals={EncoderSaliency(22): saliency}, shape=SHAPE)
    keep = SCOPE(keep_tokens=v["k"], alpha=v["alpha"]).select(tokens).keep
    for group, expected in enumerate(v["keep_idx"]):
        same(keep[group].nonzero()[:, 0], expected)


@handles("scope_add")
def sums(v: Vector) -> None:
    """AngelSlim's undocumented sum of gain and saliency is the gain with one more row for each token."""
    for group, expected in enumerate(v["order"]):
        covers = torch.cat((covers_of(v["features"][group]), (v["saliency"][group] ** v["alpha"]).diag()), dim=1)
        order, _ = greedy_cover(covers, torch.ones(len(covers)), v["k"])
        same(order, expected)


@handles("scope_saliency_cls")
def saliency_with_cls(v: Vector) -> None:
    """The reference leaves the CLS token out of the softmax, so each head's attention is scaled to a sum of 1."""
    rows = attention_rows(v["q"][:, :, :1], v["k"], scale=v["k"].shape[-1] ** -0.5)[:, :, 0, 1:]
    close((rows / rows.sum(-1, keepdim=True)).mean(1), v["saliency"], rtol=1e-5)


@handles("scope_saliency_nocls")
def saliency_without_cls(v: Vector) -> None:
    """Sums over queries and the patches of a token where the signal here has means: the same order."""
    parts, first = [], 0
    for length in v["lengths"].tolist():
        q, k = (v[name][:, first : first + length] for name in "qk")
        rows = attention_rows(q[None], k[None], scale=k.shape[-1] ** -0.5)
        parts.append(rows[0].mean(0).sum(0).unflatten(0, (-1, v["merge"] ** 2)).sum(1))
        first += length
    close(torch.cat(parts)[v["reverse_indices"]], v["saliency"], rtol=1e-5)
