# SPDX-License-Identifier: Apache-2.0
"""AIM: bipartite merging of each image or frame, then pruning by PageRank down to nothing inside the LLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from vtprune import budget
from vtprune.errors import ConfigError
from vtprune.methods.base import BeforeLLM, Composite, Method, Progressive, Scorer, Share
from vtprune.ops.bipartite_merging import bipartite_merging
from vtprune.ops.page_rank import attention_page_rank
from vtprune.signals import LayerSignal, LayerView
from vtprune.tokens import ModelShape, Selection, VisualTokens

PUBLISHED_LAYERS, PUBLISHED_DEPTH = (14, 22), 28


@dataclass(frozen=True)
class AttentionPageRank(LayerSignal):
    """(groups, tokens): ranks of the visual tokens by `vtprune.ops.page_rank` over the attention of the decoder layer
    before the cut, in which all tokens of the prompt take part; those that are masked have a rank to pass on."""

    temperature: float
    iterations: int
    damping: float

    def attends(self, cut: int) -> tuple[int, ...]:
        return (cut - 1,)

    def read_layer(self, view: LayerView) -> Tensor:
        attention = view.attention(view.layer - 1)
        queries, keys, scores = attention.everything()
        ranks = attention_page_rank(
            queries,
            keys,
            mask=attention.mask,
            valid=attention.counted(view.present),
            temperature=self.temperature,
            iterations=self.iterations,
            damping=self.damping,
            **scores,
        )
        return view.groups.gather(ranks)


@dataclass(frozen=True, kw_only=True)
class AIM(Composite):
    """Merges similar tokens before the LLM and prunes the rest layer by layer inside it (arXiv 2412.03248).

    Stages: before the LLM the tokens of each crop or frame are merged in rounds, every other token into the most
    similar of the rest, by plain means. Inside it all tokens stay up to one layer, none are left from another one on,
    and in between they go in equal steps on the input of every layer: first those that PageRank over the attention of
    the layer before ranks lowest.
    Deviations: by default tokens are removed, not masked, so that what is gone has no rank to pass on; merged tokens
    keep their order; LLaVA's tokens, too, are merged behind the projector by their own similarity (the reference merges
    them before it, by keys of the encoder); images are merged like frames of a video; while decoding every layer sees
    what it saw in the prefill (in the reference the first layer loses sight of all visual tokens). Positions are
    renumbered before the LLM, as in the reference, and kept inside it.

    Fields
        keep_ratio, keep_tokens: averaged over the LLM's layers, both stages together: the merge before the LLM is sized
            to meet them, and where nothing need be merged the steps inside are smaller. The published setting for
            videos, a merge to 25 %, is a keep_ratio of 0.165.
        removal: "physical" (default) takes tokens out of the sequence and the KV cache; "masking" hides them from the
            layers that follow, as the reference does, so that they still pass on ranks (exact with sdpa and eager
            attention). Masking saves nothing; the report counts what is seen, its FLOPs and bytes what is held.
        layers: last decoder layer that sees all tokens and first one that sees none, 0-based, the second at most the
            depth; default None: (14, 22) of 28, rescaled.
        temperature: divisor of the attention scores, > 0, default 0.1.
        iterations: steps of PageRank, >= 0, default 5.
        damping: share of the rank dealt out anew in each step, in [0, 1], default 0.
        reference_quirks: between rounds of merging, put tokens that found no partner in order of similarity and before
            all others, as the reference does, which decides who may merge in the next round; they enter the LLM in
            their own order all the same. Default False.
    """

    name: ClassVar[str] = "aim"
    signal: ClassVar[str] = "similarity of the tokens, PageRank over attention in the LLM"
    paper: ClassVar[str] = "arXiv 2412.03248"

    removal: Literal["physical", "masking"] = "physical"
    layers: tuple[int, int] | None = None
    temperature: Annotated[float, Gt(0)] = 0.1
    iterations: Annotated[int, Ge(0)] = 5
    damping: Share = 0.0
    reference_quirks: bool = False

    def ends(self, shape: ModelShape) -> tuple[int, int]:
        """Last decoder layer that sees all tokens, and first one that sees none."""
        depth = shape.decoder_layers
        if self.layers is None:
            return budget.rescale_layers(PUBLISHED_LAYERS, PUBLISHED_DEPTH, depth)
        full, empty = self.layers
        if not 0 <= full < min(empty, depth - 1) or empty > depth:
            raise ConfigError(f"aim: layers={self.layers} must ascend within 0..{depth}, the first up to {depth - 2}")
        return full, empty

    def steps(self, shape: ModelShape) -> dict[int, float]:
        """Decoder layer -> share of the entering tokens left on its input."""
        full, empty = self.ends(shape)
        return {cut: (empty - cut) / (empty - full) for cut in range(full + 1, min(empty + 1, shape.decoder_layers))}

    def average(self, shape: ModelShape) -> float:
        """Tokens held, averaged over the layers, over those entering."""
        steps = self.steps(shape)
        return budget.schedule_ratio(tuple(steps), tuple(steps.values()), shape.decoder_layers)

    def check_budget(self, shape: ModelShape) -> None:
        super().check_budget(shape)
        self.ends(shape)

    def parts(self, shape: ModelShape) -> tuple[Method, ...]:
        average, steps = self.average(shape), self.steps(shape)
        entering = left = {"keep_tokens": self.keep_tokens}
        if self.keep_ratio is not None:
            entering = {"keep_ratio": min(self.keep_ratio / average, 1.0)}
            left = {"keep_ratio": max(self.keep_ratio, average)}
        return (
            _Merge(**entering, average=average, positions=self.positions, reference_quirks=self.reference_quirks),
            _Prune(
                **left,
                layers=tuple(steps),
                schedule=tuple(steps.values()),
                request=AttentionPageRank(self.temperature, self.iterations, self.damping),
                masks=self.removal == "masking",
                positions="original",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class _Merge(BeforeLLM):
    """The part before the LLM.

    Fields
        keep_tokens: averaged over the LLM's layers, both stages together.
        average: what the other part holds of the tokens entering the LLM.
        reference_quirks: see above.
    """

    name: ClassVar[str] = "aim"
    signal: ClassVar[str] = "similarity of the tokens"

    average: float
    reference_quirks: bool = False

    def budgets(self, lengths: Tensor, images: Tensor) -> Tensor:
        counts = super().budgets(lengths, images)
        # Rounded down, so that the other part has to make up by holding more and not less than it can.
        return counts if self.keep_ratio is not None else torch.minimum((counts / self.average).long(), lengths)

    def select(self, tokens: VisualTokens) -> Selection:
        merged = bipartite_merging(
            tokens.features, tokens.budget, valid=tokens.valid, reference_quirks=self.reference_quirks
        )
        return Selection(*merged.in_place(tokens.features))


@dataclass(frozen=True, kw_only=True)
class _Prune(Scorer, Progressive):
    """The part inside the LLM.

    Fields
        layers, schedule: cuts and the share of the entering tokens left after each.
        request: which ranks.
    """

    name: ClassVar[str] = "aim"
    signal: ClassVar[str] = "PageRank over attention in the LLM"

    layers: tuple[int, ...]
    schedule: tuple[float, ...]
    request: AttentionPageRank
    masks: bool = False

    def cuts(self, shape: ModelShape) -> tuple[int, ...]:
        return self.layers

    def shares(self) -> tuple[float, ...]:
        return self.schedule

    def budgets(self, shape: ModelShape, entering: Tensor, crops: Tensor) -> Tensor:
        if self.keep_ratio is not None:
            return super().budgets(shape, entering, crops)
        columns = []
        for n, count in zip(entering.tolist(), crops.tolist(), strict=True):
            # Crops smaller than the count leave it to the larger ones, as far as these can.
            ratio = min(self.keep_tokens * count / n, 1.0) if n else 1.0
            columns.append(
                budget.schedule_counts(self.name, self.layers, self.schedule, shape.decoder_layers, n, ratio)
            )
        return torch.tensor(columns, dtype=torch.long).T

    def signals(self, shape: ModelShape):
        return (self.request,)

    def scores(self, tokens: VisualTokens) -> Tensor:
        return tokens[self.request]
