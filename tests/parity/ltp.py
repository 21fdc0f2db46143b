# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune.ops.attention_threshold import above_threshold, cascade_rate, mean_received, near_best, rising_threshold
from vtprune.ops.selection import top_k_mask

from . import Vector, close, handles, same


@handles("ltp_*")
def pruners(v: Vector) -> None:
    layers, alive = 12, v["attention_mask"][:, 0, 0] == 0
    lengths = v["lengths"]
    same(alive.sum(1), lengths)
    scores = mean_received(v["attention_probs"], alive, reference_quirks=True)
    for layer in (6, 11):
        threshold = rising_threshold(0.02, layer, layers)
        assert abs(threshold - v[f"abs_l{layer}.threshold"]) < 1e-8
        close(scores, v[f"abs_l{layer}.scores"], rtol=1e-5)
        same(above_threshold(scores, alive, threshold, reference_quirks=True), v[f"abs_l{layer}.keep"])
    same(near_best(scores, alive, 0.25), v["rel_0.25.keep"])
    for layer in (2, 3, 7, 11):
        rate = cascade_rate(0.5, layer, layers)
        assert abs(rate - v[f"cascade_l{layer}.keep_rate"]) < 1e-9
        counts = torch.tensor([round(length * rate) for length in lengths.tolist()])
        same(top_k_mask(scores, alive, counts), v[f"cascade_l{layer}.keep"])

    # Undiluted, a sample scores as it does alone.
    undiluted = mean_received(v["attention_probs"], alive)
    for row, length in enumerate(lengths.tolist()):
        alone = v["attention_probs"][row : row + 1, :, :length, :length]
        close(undiluted[row, :length], mean_received(alone, alive[row : row + 1, :length])[0])
