# SPDX-License-Identifier: Apache-2.0
"""Zero-TPrune: drop patches that are like more important ones, or unimportant by the encoder's attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Interval

from vtprune.errors import BudgetError, ConfigError
from vtprune.methods.base import Share
from vtprune.methods.in_layers import InLayers, LayerTokens, Projection, depths, placed
from vtprune.ops.token_reduction import Reduction
from vtprune.ops.weighted_page_rank import rank_pruning
from vtprune.tokens import ModelShape

PUBLISHED_LAYERS, PUBLISHED_SHARES = (2, 5, 8), (0.9, 0.8, 0.7)


@dataclass(frozen=True, kw_only=True)
class ZeroTPrune(InLayers):
    """Drops patches behind a few layers of the vision encoder by a page rank on their attention (arXiv 2305.17328).

    Stage: inside the vision encoder. First, tokens of the less important half whose keys are most like one of the other
    half are dropped; then the least important ones. Nothing is merged, and the encoder puts out the tokens that are
    left, in their order. CLS, register and distillation tokens stay.
    Deviations: the code of the paper was not published, nor its layers and shares, which are searched for each model;
    the defaults are those of the authors' early code. `vtprune.ops.weighted_page_rank` says what else the paper leaves
    open.

    Fields
        layers: 0-based layers behind which tokens go; default None: 2, 5 and 8 of 12, at the same relative depth.
        shares: share of the patches that each of them leaves of those that reach it, in (0, 1], as many as layers;
            default (0.9, 0.8, 0.7). With keep_ratio or keep_tokens, each of the layers drops about as many tokens
            instead.
        similar: share of the tokens dropped that go by similarity, in [0, 1], default 0.5.
        iterations: steps of the page rank, >= 1; default None: 30 in the first three layers, 1 in the last three, 5 in
            between.
        damping: share of the rank that every step spreads evenly, in [0, 1], default 0.
        temperature: divisor of attention scores, > 0, default 1.
        cls_start: let a CLS token start with sqrt(tokens) times the rank of others, default True.
        variances: range of the variance of ranks in which a head counts, default (0.01, 0.7); None counts all.
    """

    name: ClassVar[str] = "zero_tprune"
    signal: ClassVar[str] = "attention and key similarity in the encoder"
    paper: ClassVar[str] = "arXiv 2305.17328"
    needs_budget: ClassVar[bool] = False
    place = "behind"
    reads: ClassVar[tuple[Projection, ...]] = ("queries", "keys")
    drops = True

    layers: tuple[Annotated[int, Ge(0)], ...] | None = None
    shares: tuple[Annotated[float, Interval(gt=0, le=1)], ...] = PUBLISHED_SHARES
    similar: Share = 0.5
    iterations: Annotated[int, Ge(1)] | None = None
    damping: Share = 0.0
    temperature: Annotated[float, Gt(0)] = 1.0
    cls_start: bool = True
    variances: tuple[float, float] | None = (0.01, 0.7)

    def check_budget(self, shape: ModelShape) -> None:
        super().check_budget(shape)
        chosen = depths(self.layers, PUBLISHED_LAYERS, shape.encoder_layers)
        if self.keep_ratio is None and self.keep_tokens is None and len(chosen) != len(self.shares):
            raise ConfigError(f"{self.name}: {len(self.shares)} shares for layers {chosen}; give one for each")

    def schedule(self, layers: int, patches: int, protected: int) -> list[int]:
        chosen = depths(self.layers, PUBLISHED_LAYERS, layers)
        if self.keep_ratio is not None or self.keep_tokens is not None:
            left = self.patches_left(patches)
            if left < patches and not chosen:
                raise BudgetError(f"{self.name}: the encoder has too few layers for the published ones; give layers")
            steps = [(patches - left + later) // len(chosen) for later in reversed(range(len(chosen)))]
        else:
            steps, left = [], patches
            for share in self.shares:
                steps.append(left - int(left * share))
                left -= steps[-1]
        return placed(steps, chosen, layers)

    def reduce(self, tokens: LayerTokens) -> Reduction | None:
        queries, keys = tokens.read("queries"), tokens.read("keys")
        iterations = 30 if tokens.layer < 3 else 1 if tokens.layer >= tokens.layers - 3 else 5
        return rank_pruning(
            queries,
            keys,
            queries.shape[2] - tokens.protected - tokens.remove,
            scale=tokens.scale,
            similar=int(self.similar * tokens.remove),
            protected=tokens.protected,
            temperature=self.temperature,
            iterations=self.iterations or iterations,
            damping=self.damping,
            cls_start=self.cls_start and tokens.has_cls,
            variances=self.variances,
        )
