# SPDX-License-Identifier: Apache-2.0
"""PruMerge: keep the outliers of the CLS attention, and merge the other tokens into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from vtprune.devices import read, send
from vtprune.methods.base import BeforeLLM
from vtprune.ops.outlier_merging import gather_around, one_wide_head
from vtprune.ops.outliers import above_quartiles
from vtprune.ops.selection import top_k_mask
from vtprune.signals import EncoderKeys, EncoderSaliency
from vtprune.tokens import ModelShape, Selection, VisualTokens


@dataclass(frozen=True)
class WideAttention(EncoderSaliency):
    """(groups, tokens): `EncoderSaliency`, with the CLS query's attention as if all heads were one."""

    def of_heads(self, rows: Tensor) -> Tensor:
        return one_wide_head(rows)


@dataclass(frozen=True, kw_only=True)
class PruMerge(BeforeLLM):
    """Keeps tokens whose attention is an outlier, and merges the others into them (arXiv 2403.15388).

    Stage: before the LLM, from attention and keys of the last encoder layer. Text is not used. Attention is that of the
    CLS token, as if all heads were one; where the encoder has none, it is what a token receives. Each kept token
    becomes the mean of itself and the tokens with the most similar keys, weighted by attention. One more token is the
    mean of all tokens that are not kept. Published results: 5.5 % of the tokens on average, without a budget.
    Deviations: means are means, as in the paper (see reference_quirks); tokens are merged after the projector and not
    before it; the quartiles are those of each crop (in the reference, those of a whole batch); kept tokens stay in
    raster order, and the mean of the rest takes the place of the most salient token among them (in the reference it is
    last).

    Fields
        keep_ratio, keep_tokens: optional, and the mean of the rest counts; without them, outliers say how many stay.
        whiskers: interquartile ranges above the third quartile from which attention is an outlier, >= 0, default 1.5.
        neighbours: number of tokens that each kept token gathers, >= 0, default 32.
        merge: whether tokens are merged, default True; False drops them, and there is no mean of the rest.
        reference_quirks: weighted sums in place of weighted means; default False.
    """

    name: ClassVar[str] = "prumerge"
    signal: ClassVar[str] = "CLS attention and keys in the encoder"
    paper: ClassVar[str] = "arXiv 2403.15388"
    needs_budget: ClassVar[bool] = False
    merges: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True

    whiskers: Annotated[float, Ge(0)] = 1.5
    neighbours: Annotated[int, Ge(0)] = 32
    merge: bool = True
    reference_quirks: bool = False

    def signals(self, shape: ModelShape):
        layer = shape.encoder_layers - 1
        return (WideAttention(layer), *((EncoderKeys(layer),) if self.merge else ()))

    def select(self, tokens: VisualTokens) -> Selection:
        attention = tokens[WideAttention(tokens.shape.encoder_layers - 1)]
        kept, most = self._kept(tokens, attention)
        if not self.merge:
            return Selection(kept)
        keys = tokens[EncoderKeys(tokens.shape.encoder_layers - 1)]
        features, rest = gather_around(
            tokens.features,
            keys,
            attention,
            kept,
            tokens.valid,
            most,
            self.neighbours,
            reference_quirks=self.reference_quirks,
        )
        # A group that keeps all, or just one token, has no mean of a rest.
        count = kept.sum(1)
        with_rest = (count < tokens.lengths) & (send(self._room(tokens), count.device) > 0)
        # The most salient token that is not kept, the first of equals.
        place = attention.float().masked_fill(kept | ~tokens.valid, -torch.inf).argmax(1, keepdim=True)
        at = place.unsqueeze(2).expand(-1, 1, features.shape[2])
        own = torch.where(with_rest[:, None, None], rest.unsqueeze(1), features.gather(1, at))
        features = torch.where((count == tokens.lengths)[:, None, None], tokens.features, features.scatter(1, at, own))
        keep = kept.scatter(1, place, kept.gather(1, place) | with_rest.unsqueeze(1))
        itself = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
        into = torch.where(with_rest.unsqueeze(1), place, -1).expand_as(keep)
        return Selection(keep, features, torch.where(keep, itself, into).masked_fill(~tokens.valid, -1))

    def _room(self, tokens: VisualTokens) -> Tensor:
        """(groups,) long on the CPU: 1 where the mean of the rest has a place of its own."""
        budget = tokens.host.budget
        return ((budget < 0) | (budget > 1)).long() if self.merge else torch.zeros_like(budget)

    def _kept(self, tokens: VisualTokens, attention: Tensor) -> tuple[Tensor, int]:
        """(groups, tokens) bool, the tokens that stay without the mean of the rest; the largest number of them."""
        budget, lengths = tokens.host.budget, tokens.host.lengths
        if bool((budget < 0).any()):
            outliers = above_quartiles(attention, tokens.valid, self.whiskers).sum(1)
            kept = self._adaptive(attention, tokens, torch.minimum(outliers.clamp_min(1), tokens.lengths))
            return kept, int(read(kept.sum(1).amax())[0]) if len(kept) else 0
        counts = torch.where(budget >= lengths, lengths, budget - self._room(tokens))
        return self._counted(attention, tokens, counts), int(counts.max()) if len(counts) else 0

    def _adaptive(self, attention: Tensor, tokens: VisualTokens, outliers: Tensor) -> Tensor:
        """(groups, tokens) bool: what stays for so many outliers, (groups,) long."""
        return top_k_mask(attention.float(), tokens.valid, outliers)

    def _counted(self, attention: Tensor, tokens: VisualTokens, counts: Tensor) -> Tensor:
        """(groups, tokens) bool: as many as (groups,) long `counts` on the CPU says."""
        return top_k_mask(attention.float(), tokens.valid, counts)
