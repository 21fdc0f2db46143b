# SPDX-License-Identifier: Apache-2.0
"""ToMe: merge the patches with the most similar keys, a few in every layer of the vision encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from vtprune.errors import BudgetError, ConfigError
from vtprune.methods.in_layers import InEveryLayer, LayerTokens, Projection, depths, placed
from vtprune.ops.seeded_random import seeded_uniform
from vtprune.ops.soft_matching import kth_matching, random_matching, soft_matching
from vtprune.ops.token_reduction import Reduction
from vtprune.tokens import ModelShape


@dataclass(frozen=True, kw_only=True)
class ToMe(InEveryLayer):
    """Merges similar patches between attention and MLP of every layer of the vision encoder (arXiv 2210.09461).

    Stage: inside the vision encoder. Every second token looks for the most similar of the others, by the cosine of
    keys (mean over heads). The most similar pairs merge into the mean of their tokens, weighted by their sizes, i.e.
    the numbers of patches they stand for. CLS, register and distillation tokens never merge.
    Deviations: any number of tokens at the front is protected (the reference: a CLS and a distillation token);
    LayerScale, drop path and norms of queries and keys stay, which the reference for timm leaves out; attention pooling
    is weighted by sizes, too.

    Fields
        r: how many tokens merge in a layer, as in all methods in every layer. Published for ImageNet: 13 for ViT-B/16,
            7 for ViT-L/16.
        prop_attn: add the logarithm of a token's size to its attention scores, default True. The authors turn it off
            for MAE models that are not trained with it.
        track_size: weight means by sizes, default True. False takes plain means in every layer, and needs
            prop_attn=False.
        variant: "soft" (default); "kth" keeps every k-th patch, in `layers`, and merges all others into the most
            similar one of them; "random" merges r random patches.
        k: length of a run of patches for "kth", >= 2, default 2.
        layers: 0-based layers in which "kth" merges, by default the middle one. It takes no budget.
        seed: for "random", >= 0, default 0. All images of a batch have the same draws.
    """

    name: ClassVar[str] = "tome"
    signal: ClassVar[str] = "key similarity in the encoder"
    paper: ClassVar[str] = "arXiv 2210.09461"
    merges: ClassVar[bool] = True
    place = "between"
    reads: ClassVar[tuple[Projection, ...]] = ("keys",)

    prop_attn: bool = True
    track_size: bool = True
    variant: Literal["soft", "kth", "random"] = "soft"
    k: Annotated[int, Ge(2)] = 2
    layers: tuple[Annotated[int, Ge(0)], ...] | None = None
    seed: Annotated[int, Ge(0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prop_attn and not self.track_size:
            raise ConfigError(f"{self.name}: without track_size there are no sizes; set prop_attn=False, too")

    @property
    def biases(self) -> bool:
        return self.prop_attn

    def check_budget(self, shape: ModelShape) -> None:
        if self.variant == "kth":
            if self._has_budget:
                raise BudgetError(f"{self.name}: variant='kth' takes k and layers, and no budget")
            depths(self.layers, (6,), shape.encoder_layers)
            return
        if self.layers is not None:
            raise ConfigError(f"{self.name}: layers is for variant='kth'")
        super().check_budget(shape)

    def schedule(self, layers: int, patches: int, protected: int) -> list[int]:
        if self.variant == "kth":
            chosen = depths(self.layers, (6,), layers)
            return placed([1] * len(chosen), chosen, layers)
        return super().schedule(layers, patches, protected)

    def reduce(self, tokens: LayerTokens) -> Reduction | None:
        metric = tokens.read("keys").mean(1)
        options = {"sizes": tokens.sizes if self.track_size else None, "protected": tokens.protected}
        if self.variant == "kth":
            return kth_matching(metric, self.k, **options)
        if self.variant == "random":
            draws = seeded_uniform([tokens.layer], self.seed, metric.shape[1]).expand(len(metric), -1)
            return random_matching(metric, tokens.remove, draws, **options)
        return soft_matching(metric, tokens.remove, **options)
