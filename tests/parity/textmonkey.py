# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune.ops.repetition import similarity_to_later
from vtprune.ops.selection import top_k_mask

from . import Vector, close, handles, same


@handles("textmonkey_*")
def filtered(v: Vector) -> None:
    features, count = v["x"], v["r"]
    scores = similarity_to_later(features)
    close(scores, v["node_max"], rtol=1e-5, atol=1e-6)
    valid = torch.ones_like(scores, dtype=torch.bool)
    keep = top_k_mask(-scores, valid, torch.full((len(features),), count))
    same(keep.nonzero()[:, 1].view(-1, count), v["keep_idx"])
    close(features[keep].view(-1, count, features.shape[-1]), v["out"])
