# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune.ops.selection import top_k_mask
from vtprune.ops.similarity import similarity_to

from . import Vector, close, handles, same


@handles("glsim_*")
def patches(v: Vector) -> None:
    """The score and the patches that it picks. The crops for a trained classifier prune nothing."""
    assert v["metric"] == "cos"
    features, count = v["feats"], v["top_o"]
    scores = similarity_to(features[:, 0], features[:, 1:])
    close(scores, v["sim"], rtol=1e-5, atol=1e-6)
    keep = top_k_mask(scores, torch.ones_like(scores, dtype=torch.bool), torch.full((len(features),), count))
    same(keep.nonzero()[:, 1].view(-1, count), v["top_idx_sorted"])
