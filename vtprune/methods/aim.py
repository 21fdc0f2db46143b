# SPDX-License-Identifier: Apache-2.0
"""AIM: merge similar tokens of each image or frame, then prune by PageRank down to nothing inside the LLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from vtprune import budget
from vtprune.errors import ConfigError
from vtprune.methods.base import BeforeLLM, Composite, Method, Scorer, Share
from vtprune.methods.schedules import Progressive
from vtprune.ops.bipartite_merging import bipartite_merging
from vtprune.ops.page_rank import attention_ranks, over_heads
from vtprune.signals import LayerSignal, LayerView
from vtprune.tokens import ModelShape, Selection, VisualTokens

PUBLISHED_LAYERS, PUBLISHED_DEPTH = (14, 22), 28


@dataclass(frozen=True)
class AttentionPageRank(LayerSignal):
    """(groups, tokens): ranks of the visual tokens by `vtprune.ops.page_rank` over the attention of the decoder layer
    before the cut, as root mean squares over heads. All tokens of the prompt take part. Masked tokens still pass on a
    rank."""

    temperature: float
    iterations: int
    damping: float

    def attends(self, cut: int) -> tuple[int, ...]:
        return (cut - 1,)

    def read_layer(self, view: LayerView) -> Tensor:
        attention = view.attention(view.layer - 1)
        queries, keys, scores = attention.everything()
        ranks = attention_ranks(
            queries,
            keys,
            mask=attention.mask,
            valid=attention.counted(view.present),
            temperature=self.temperature,
            iterations=self.iterations,
            damping=self.damping,
            **scores,
        )
        return view.groups.gather(over_heads(ranks))


@dataclass(frozen=True, kw_only=True)
class AIM(Composite):
    """Merges similar tokens before the LLM and prunes the rest layer by layer inside it (arXiv 2412.03248).

    Stages: before the LLM, the tokens of each crop or frame are merged in rounds. Each even token goes into the most
    similar odd token, and merged tokens are plain means. Inside the LLM, all tokens stay up to one layer, and no token
    is left from a later layer on. In between, tokens are removed in equal steps on the input of every layer, first
    those with the lowest PageRank over the attention of the layer before.
    Deviations: by default tokens are removed and not masked, so a removed token does not pass on a rank; merged tokens
    keep their order; LLaVA's tokens are also merged after the projector, by their own similarity (the reference merges
    them before it, by keys of the encoder); images are merged like frames of a video; while decoding, every layer sees
    the tokens that it saw in the prefill (in the reference, the first layer no longer sees any visual token). Positions
    are renumbered before the LLM, as in the reference, and kept inside it.

    Fields
        keep_ratio, keep_tokens: averaged over the LLM's layers, for both stages together. The merge before the LLM is
            sized to meet them. If no merge is needed, the steps inside the LLM are smaller. The published setting for
            videos, a merge to 25 %, is a keep_ratio of 0.165.
        removal: "physical" (default) takes tokens out of the sequence and the KV cache. "masking" hides them from the
            following layers, as the reference does, so they still pass on ranks (exact with sdpa and eager attention).
            Masking saves nothing: the report counts visible tokens, but FLOPs and bytes of all tokens.
        layers: last decoder layer that sees all tokens, and first layer that sees none, 0-based, the second at most the
            depth; default None: (14, 22) of 28, rescaled to the model's depth.
        temperature: divisor of the attention scores, > 0, default 0.1.
        iterations: steps of PageRank, >= 0, default 5.
        damping: share of the rank that each step spreads evenly over all tokens, in [0, 1], default 0.
        reference_quirks: between rounds of merging, put tokens without a merge first, by similarity, as the reference
            does. This decides which tokens may merge in the next round. They still enter the LLM in their original
            order. Default False.
    """

    name: ClassVar[str] = "aim"
    signal: ClassVar[str] = "similarity of the tokens, PageRank over attention in the LLM"
    paper: ClassVar[str] = "arXiv 2412.03248"
    text_aware: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    removal: Literal["physical", "masking"] = "physical"
    layers: tuple[int, int] | None = None
    temperature: Annotated[float, Gt(0)] = 0.1
    iterations: Annotated[int, Ge(0)] = 5
    damping: Share = 0.0
    reference_quirks: bool = False

    def ends(self, shape: ModelShape) -> tuple[int, int]:
        """Last decoder layer that sees all tokens, and first layer that sees none."""
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
        """Number of tokens, averaged over the layers, divided by the number of tokens that enter the LLM."""
        steps = self.steps(shape)
        return budget.schedule_ratio(tuple(steps), tuple(steps.values()), shape.decoder_layers)

    def check_budget(self, shape: ModelShape) -> None:
        super().check_budget(shape)
        self.ends(shape)

    def parts(self, shape: ModelShape) -> tuple[Method, ...]:
        average, steps = self.average(shape), self.steps(shape)
        entering = inside = {"keep_tokens": self.keep_tokens}
        if self.keep_ratio is not None:
            entering = {"keep_ratio": min(self.keep_ratio / average, 1.0)}
            inside = {"keep_ratio": max(self.keep_ratio, average)}
        return (
            _Merge(**entering, average=average, positions=self.positions, reference_quirks=self.reference_quirks),
            _Prune(
                **inside,
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
        keep_tokens: averaged over the LLM's layers, for both stages together.
        average: share of the entering tokens that the part inside the LLM has, averaged over the layers.
        reference_quirks: as in `AIM`.
    """

    name: ClassVar[str] = "aim"
    signal: ClassVar[str] = "similarity of the tokens"

    average: float
    reference_quirks: bool = False

    def budgets(self, lengths: Tensor, images: Tensor) -> Tensor:
        counts = super().budgets(lengths, images)
        # Rounded down: the part inside the LLM can then meet the budget with smaller steps. Larger ones are impossible.
        return counts if self.keep_ratio is not None else torch.minimum((counts / self.average).long(), lengths)

    def select(self, tokens: VisualTokens) -> Selection:
        merged = bipartite_merging(
            tokens.features, tokens.host.budget, lengths=tokens.host.lengths, reference_quirks=self.reference_quirks
        )
        return Selection(*merged.in_place(tokens.features))


@dataclass(frozen=True, kw_only=True)
class _Prune(Scorer, Progressive):
    """The part inside the LLM.

    Fields
        layers, schedule: cuts, and the share of the entering tokens that is left after each cut.
        request: the signal with the ranks.
        masks: whether tokens are hidden and not removed.
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
            # What crops smaller than the count cannot keep goes to larger crops, as far as possible.
            ratio = min(self.keep_tokens * count / n, 1.0) if n else 1.0
            columns.append(
                budget.schedule_counts(self.name, self.layers, self.schedule, shape.decoder_layers, n, ratio)
            )
        return torch.tensor(columns, dtype=torch.long).T

    def signals(self, shape: ModelShape):
        return (self.request,)

    def scores(self, tokens: VisualTokens) -> Tensor:
        return tokens[self.request]
