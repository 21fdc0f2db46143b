# SPDX-License-Identifier: Apache-2.0
"""MCTF: merge patches that are similar, uninformative and small, before layers of the vision encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from vtprune.errors import BudgetError
from vtprune.methods.in_layers import InLayers, LayerTokens, Projection, depths, equal_steps, placed
from vtprune.ops.multi_criteria_fusion import OneStepAhead, fusion, fusion_count
from vtprune.ops.token_reduction import Reduction
from vtprune.tokens import ModelShape

Temperature = Annotated[float, Ge(0)]


@dataclass(frozen=True, kw_only=True)
class MCTF(InLayers):
    """Merges patches by three criteria in layers of the vision encoder (arXiv 2403.10030).

    Stage: inside the vision encoder. Before a layer, the attention that the tokens would have in it is computed. Pairs
    that are similar (cosine of hidden states), receive little attention and stand for few patches merge, in both
    directions. The attention is merged with them and used in the layer, so it is computed once. Sizes bias the
    attention, as in ToMe.
    Deviations: the encoder's own attention still runs in these layers, for nothing; more tokens than a CLS token can be
    protected. The published accuracies are of fine-tuned models.

    Fields
        r: how many tokens merge in a layer, > 0; below 1 a share of the patches. As an absolute number it leaves 10
            tokens at least. 16 if there is neither r nor keep_ratio nor keep_tokens; the latter two merge about as many
            tokens in each of the layers.
        layers: 0-based layers; default None: all but the first.
        one_step_ahead: 1 (default) as above; 2 computes the attention of the merged tokens again; 0 merges behind the
            layer, by its own attention.
        tau_similarity: temperature of the similarity, >= 0, default 1; 0 leaves the criterion out.
        tau_information: the same for the attention received, default 20.
        tau_size: the same for the size, default 40.
        bidirectional: merge every second token into the others and then the other way round, default True.
        pooling: weights of means: "importance" times size (default), "size" or "mean" for none; or "max", the maximum.
        prop_attn: add the logarithm of a token's size to its attention scores, default True.
    """

    name: ClassVar[str] = "mctf"
    signal: ClassVar[str] = "similarity, attention and size in the encoder"
    paper: ClassVar[str] = "arXiv 2403.10030"
    merges: ClassVar[bool] = True
    needs_budget: ClassVar[bool] = False
    reads: ClassVar[tuple[Projection, ...]] = ("queries", "keys")

    r: Temperature | None = None
    layers: tuple[Annotated[int, Ge(0)], ...] | None = None
    one_step_ahead: Literal[0, 1, 2] = 1
    tau_similarity: Temperature = 1.0
    tau_information: Temperature = 20.0
    tau_size: Temperature = 40.0
    bidirectional: bool = True
    pooling: Literal["importance", "size", "mean", "max"] = "importance"
    prop_attn: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None and (self.keep_ratio is not None or self.keep_tokens is not None):
            raise BudgetError(f"{self.name}: give one of r, keep_ratio and keep_tokens")

    @property
    def place(self):
        return "before" if self.one_step_ahead else "behind"

    @property
    def biases(self) -> bool:
        return self.prop_attn

    def check_budget(self, shape: ModelShape) -> None:
        super().check_budget(shape)
        self._layers(shape.encoder_layers)

    def _layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(1, depth)) if self.layers is None else depths(self.layers, (), depth)

    def schedule(self, layers: int, patches: int, protected: int) -> list[int]:
        chosen = self._layers(layers)
        if self.keep_ratio is not None or self.keep_tokens is not None:
            steps = equal_steps(self.name, len(chosen), patches, self.patches_left(patches))
        else:
            tokens, steps = patches + protected, []
            for _ in chosen:
                steps.append(fusion_count(tokens, 16 if self.r is None else self.r, protected=protected))
                tokens -= steps[-1]
        return placed(steps, chosen, layers)

    def reduce(self, tokens: LayerTokens) -> Reduction | None:
        return fusion(
            tokens.hidden,
            tokens.attention().mean((1, 2)),
            tokens.remove,
            sizes=tokens.sizes,
            tau_similarity=self.tau_similarity,
            tau_information=self.tau_information,
            tau_size=self.tau_size,
            bidirectional=self.bidirectional,
            pooling=self.pooling,
            protected=tokens.protected,
        )

    def attention_behind(self, tokens: LayerTokens, reduction: Reduction) -> OneStepAhead | None:
        return OneStepAhead(tokens.attention(), reduction) if self.one_step_ahead == 1 else None
