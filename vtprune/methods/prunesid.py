# SPDX-License-Identifier: Apache-2.0
"""PruneSID: group tokens by principal components, and keep salient tokens of each group that are unlike each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.devices import read, send
from vtprune.methods.base import BeforeLLM
from vtprune.ops.principal_groups import component_counts, loadings, mean_likeness, without_likes
from vtprune.ops.token_pairs import directions_of
from vtprune.signals import EncoderFeatures, EncoderSaliency
from vtprune.tokens import ModelShape, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class PruneSID(BeforeLLM):
    """Groups tokens by principal components and suppresses likes in each group (arXiv 2603.09480).

    Stage: before the LLM. Text is not used. Encoders with a CLS token: what the projector reads, and the CLS attention
    in the encoder layer that it comes from, as in the authors' LLaVA variant. Other encoders: projected features, and
    each token's weight in its component, as in their Qwen2-VL variant. Tokens more alike than a threshold, which grows
    with the budget and the mean likeness, suppress each other. Every group gets a share of the budget by how many of
    its tokens are left. Published settings: 64, 128 or 192 tokens, the CLS token included.
    Deviations: components are found from a fixed start in more steps (the reference draws its start at random, and
    keeps other tokens in each run); kept tokens stay in raster order; the CLS token does not enter the LLM; budgets
    below 4 work (the reference fails); every crop has its own budget and groups. The paper's budget by image complexity
    is not in the authors' code, and not here.
    """

    name: ClassVar[str] = "prunesid"
    signal: ClassVar[str] = "principal components, CLS attention in the encoder"
    paper: ClassVar[str] = "arXiv 2603.09480"

    def signals(self, shape: ModelShape):
        return (EncoderFeatures(), EncoderSaliency(shape.feature_layer)) if shape.has_cls else ()

    def select(self, tokens: VisualTokens) -> Selection:
        has_cls, host = tokens.shape.has_cls, tokens.host
        features = tokens[EncoderFeatures()] if has_cls else tokens.features
        total = host.budget + 1 if has_cls else host.budget
        components = (total // 4).clamp_min(1 if has_cls else 4)
        weights = loadings(features, host.lengths, components)
        loading, belong = weights.max(2)

        directions = directions_of(features, tokens.valid)
        scores = tokens[EncoderSaliency(tokens.shape.feature_layer)] if has_cls else loading
        threshold = self._threshold(mean_likeness(directions, tokens.lengths), total, host.lengths, has_cls)
        rank, sizes, left = without_likes(directions, scores, belong, tokens.valid, threshold, weights.shape[2])
        sizes, left = read(sizes, left)
        budgets = torch.minimum(host.budget, host.lengths)
        counts = [
            component_counts(*each)
            for each in zip(sizes.tolist(), left.tolist(), budgets.tolist(), total.tolist(), strict=True)
        ]
        limits = send(torch.tensor(counts, dtype=torch.long).reshape(sizes.shape), belong.device)
        return Selection(tokens.valid & (rank < limits.gather(1, belong)))

    @staticmethod
    def _threshold(likeness: Tensor, total: Tensor, lengths: Tensor, has_cls: bool) -> Tensor:
        """(groups,) cosine above which tokens are alike; likeness: the mean one; total, lengths: on the CPU."""
        if has_cls:
            return send(total / 32, likeness.device).to(likeness) * likeness
        # The authors take the mean over a square table of which only the upper half is filled.
        n = lengths.clamp_min(1)
        factor = send((18 * total / n).clamp_min(1), likeness.device).to(likeness)
        one = send(1 / n, likeness.device).to(likeness)
        return factor * (likeness * (1 - one) / 2 + one)
