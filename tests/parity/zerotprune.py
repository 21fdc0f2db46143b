# SPDX-License-Identifier: Apache-2.0
"""Importance by the authors' early code: no variance filter, no start of the CLS token, no similarity."""

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from vtprune.ops.page_rank import attention_ranks
from vtprune.ops.weighted_page_rank import rank_pruning, weighted_page_rank

from . import Vector, close, handles, same


@handles("zerotprune_em*")
def importance(v: Vector) -> None:
    logits = v["attn_logits"]
    # Scores of these "queries" and "keys" are the recorded ones.
    both = logits, torch.eye(logits.shape[-1]).expand_as(logits)
    options = dict(scale=1.0, temperature=v["tau_imp"], iterations=v["iters"], damping=v["damping"])
    close(attention_ranks(*both, **options), v["per_head_score"], rtol=1e-4)
    close(weighted_page_rank(*both, **options)[:, 1:], v["importance"], rtol=1e-4)
    keep = int((logits.shape[-1] - 1) * v["retain_rate"])
    kept = rank_pruning(*both, keep, **options).into >= 0
    assert kept[:, 0].all()
    same(kept[:, 1:].nonzero()[:, 1].view(len(kept), keep), v["keep_idx_sorted"])


@handles("zerotprune_attn_module")
def attention(v: Vector) -> None:
    x, weights = v["x"], v.weights()
    batch, tokens, dim = x.shape
    qkv = linear(x, weights["qkv.weight"], weights["qkv.bias"])
    queries, keys, values = qkv.view(batch, tokens, 3, v["heads"], -1).permute(2, 0, 3, 1, 4)
    # The attention itself is the layer's own; the temperature only sharpens the ranking.
    attended = scaled_dot_product_attention(queries, keys, values).transpose(1, 2).reshape(batch, tokens, dim)
    close(linear(attended, weights["proj.weight"], weights["proj.bias"]), v["out"], rtol=1e-4, atol=1e-5)
    options = dict(scale=queries.shape[-1] ** -0.5, temperature=v["tau_imp"], iterations=5)
    close(weighted_page_rank(queries, keys, **options)[:, 1:], v["importance"], rtol=1e-4)
    pruned = rank_pruning(queries, keys, int((tokens - 1) * v["retain_rate"]), **options)
    same((pruned.into[:, 1:] >= 0).to(torch.float32), v["keep_mask"])
