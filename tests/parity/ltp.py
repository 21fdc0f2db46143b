# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from vtprune.ops.attention import attention_received
from vtprune.ops.attention_threshold import above_threshold, rising_threshold

from . import Vector, close, handles, same


def mean_received(probabilities: Tensor, alive: Tensor) -> Tensor:
    """Queries and keys that give the recorded probabilities (batch, heads, n, n), as the method gets them."""
    queries, keys = probabilities.clamp_min(1e-30).log(), torch.eye(probabilities.shape[-1])
    seen = (probabilities > 0)[:, :1]

    def mask(first: int, last: int) -> Tensor:
        return seen[:, :, first:last]

    return attention_received(queries, keys.expand_as(queries), scale=1.0, mask=mask, valid=alive)


@handles("ltp_*")
def pruners(v: Vector) -> None:
    """Thresholds of Learned Token Pruning; the recorded rules of other methods are not built."""
    layers, alive = 12, v["attention_mask"][:, 0, 0] == 0
    lengths = v["lengths"]
    same(alive.sum(1), lengths)
    received = mean_received(v["attention_probs"], alive)
    scores = received * lengths[:, None] / alive.shape[1]
    for layer in (6, 11):
        threshold = rising_threshold(0.02, layer, layers)
        assert abs(threshold - v[f"abs_l{layer}.threshold"]) < 1e-8
        close(scores, v[f"abs_l{layer}.scores"], rtol=1e-5)
        same(above_threshold(scores, alive, threshold, reference_quirks=True), v[f"abs_l{layer}.keep"])

    # Without the padding in the mean, a sample has the same scores as alone.
    for row, length in enumerate(lengths.tolist()):
        alone = v["attention_probs"][row : row + 1, :, :length, :length]
        close(received[row, :length], mean_received(alone, alive[row : row + 1, :length])[0])
