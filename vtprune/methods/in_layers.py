# SPDX-License-Identifier: Apache-2.0
"""What methods are that shrink the sequence inside the layers of a vision encoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import pad

from vtprune.errors import BudgetError, ConfigError
from vtprune.methods.base import Method
from vtprune.ops.multi_criteria_fusion import OneStepAhead
from vtprune.ops.soft_matching import layer_counts
from vtprune.ops.token_reduction import Reduction
from vtprune.tokens import ModelShape

Projection = Literal["queries", "keys", "values"]


@dataclass(frozen=True)
class LayerTokens:
    """The tokens of a batch of images at one place of one encoder layer. All images have the same number of them."""

    hidden: Tensor
    """(batch, tokens, dim): the residual stream. CLS, register and distillation tokens come first."""
    protected: int
    """How many tokens at the front stand for no patch; they neither merge nor go."""
    sizes: Tensor | None
    """(batch, tokens) float32: how many patches each token stands for; None: one each, nothing was merged so far."""
    layer: int
    """0-based encoder layer."""
    remove: int
    """How many tokens the method's schedule takes away here."""
    layers: int
    """Number of encoder layers."""
    has_cls: bool
    """Whether the first token is a CLS token."""
    scale: float
    """Factor of the dot products of queries and keys."""
    biases: bool
    """Whether the logarithms of `sizes` are added to the attention's scores."""
    read: Callable[[Projection], Tensor]
    """Reads a projection of this layer's attention as (batch, heads, tokens, head dim); only one of `reads`. If the
    attention read an extra row (`InLayers.extra_row`), that comes behind the tokens."""

    def attention(self, queries: int | None = None) -> Tensor:
        """(batch, heads, queries, tokens) float32: attention of the first so many tokens, by default of all.

        If the attention read an extra row, there is one column more for it, the last one. Rows sum to one with it.
        """
        return self._all_attention if queries is None else self._attention(queries)

    @cached_property
    def _all_attention(self) -> Tensor:
        return self._attention(self.hidden.shape[1])  # it is large, and may be read more than once

    def _attention(self, queries: int) -> Tensor:
        # In place, because the scores are large.
        scaled = self.read("queries")[:, :, :queries] * self.scale
        scores = (scaled @ self.read("keys").transpose(2, 3)).float()
        if self.biases and self.sizes is not None:
            scores += pad(self.sizes.log(), (0, scores.shape[-1] - self.hidden.shape[1]))[:, None, None]
        return scores.softmax(-1)

    @property
    def patches(self) -> int:
        """How many tokens of an image are not protected."""
        return self.hidden.shape[1] - self.protected

    def keep(self, patches: Tensor) -> Reduction:
        """Keep patches as they are, and drop the others.

        patches: (kept,), the same of every image, or (batch, kept); long, rising; 0 is the first token that is not
            protected.
        """
        images, device = len(self.hidden), self.hidden.device
        first = torch.arange(self.protected, device=device).expand(images, -1)
        places = torch.cat([first, (patches.to(device) + self.protected).expand(images, -1)], dim=1)
        return Reduction.gather(places, self.hidden.shape[1])


@dataclass(frozen=True, kw_only=True)
class InLayers(Method):
    """A method that merges or drops tokens inside the layers of the vision encoder; the layers after it run on fewer.

    In an encoder alone: where nothing is dropped, only merged, the encoder puts out a row for every token again, what
    the token went into. So means over tokens and attention pooling are weighted by the sizes of merged tokens, and
    shapes do not change. If tokens were dropped, it puts out those that are left.

    In a vision-language model: the layers behind the one that the projector reads take nothing away. Of visual tokens
    that are copies of one row, the first one enters the LLM, so the LLM's tokens keep the order of the image; models
    that were trained with merging saw the order of the rows. Where visual tokens are made of several patches (Gemma 3,
    videos of LLaVA-OneVision), only the encoder runs on fewer tokens, and methods that drop some are refused.

    Fields (all methods inside encoder layers)
        keep_ratio: share of the patches of an image, tile or frame that is left behind the last layer that takes any
            away, in (0, 1]; 1.0 changes nothing.
        keep_tokens: the same as a number of patches, >= 1.
    """

    stage = "encoder"
    place: ClassVar[Literal["before", "between", "behind"]]
    """Where in a layer it acts: "before" it, "between" attention and MLP, or "behind" it. It is shown the tokens there,
    and the attention of this layer; before it, the attention that the tokens would have in it."""
    reads: ClassVar[tuple[Projection, ...]] = ()
    """Projections of the attention that `reduce` reads."""

    drops: ClassVar[bool] = False
    """Whether it drops tokens, so that not every token is part of a row behind the last layer."""

    @property
    def biases(self) -> bool:
        """Whether the logarithm of a token's size is added to its attention scores (proportional attention)."""
        return False

    @abstractmethod
    def schedule(self, layers: int, patches: int, protected: int) -> list[int]:
        """How many tokens each of the layers takes away of an image with so many patches and protected tokens.

        Raises BudgetError if the budget cannot be met.
        """

    @abstractmethod
    def reduce(self, tokens: LayerTokens) -> Reduction | None:
        """Take `tokens.remove` tokens away; None if nothing is to change. Only called if there are any to take away."""

    def attention_behind(self, tokens: LayerTokens, reduction: Reduction) -> OneStepAhead | None:
        """What the layer's attention is to be behind a reduction before it; None: computed anew, among the rows."""
        return None

    def extra_row(self, layer: int, hidden: Tensor) -> Tensor | None:
        """What the layer's attention is to read besides the tokens; None: nothing.

        Only layers that take tokens away are asked, and only of methods that act between attention and MLP or behind
        the layer. All tokens may attend to the row. It goes through the layer's first norm as they do, has no output,
        and counts in the FLOPs.

        layer: 0-based. hidden: (batch, tokens, dim), the residual stream that enters the layer. Returns (batch, dim),
        on the same scale, or None.
        """
        return None

    def check_budget(self, shape: ModelShape) -> None:
        """Raise BudgetError unless there is exactly one budget."""
        if self.keep_tokens == 0:
            raise BudgetError(f"{self.name}: keep_tokens=0 would leave no patches; >= 1 is possible")
        super().check_budget(shape)

    def patches_left(self, patches: int) -> int:
        """How many of so many patches `keep_ratio` or `keep_tokens` leaves. Raises BudgetError if there are too few."""
        if self.keep_ratio is not None:
            return max(1, round(self.keep_ratio * patches))
        if self.keep_tokens > patches:
            raise BudgetError(f"keep_tokens={self.keep_tokens} is larger than the image: it has {patches} patches")
        return self.keep_tokens


@dataclass(frozen=True, kw_only=True)
class InEveryLayer(InLayers):
    """A method that takes a few tokens away in every layer of the vision encoder.

    Fields (all methods in every layer)
        r: how many tokens go in a layer, at most half: an int >= 0 for every layer, a list with one for each layer (0
            for those it lacks), or (r, inflect) with inflect in [-1, 1]: from r * (1 - inflect) in the first layer to
            r * (1 + inflect) in the last one. Give r, keep_ratio or keep_tokens; the latter two take about as many
            tokens in every layer.
    """

    r: Annotated[int, Ge(0)] | tuple[Annotated[int, Ge(0)], float] | list[Annotated[int, Ge(0)]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.r is not None) + (self.keep_ratio is not None) + (self.keep_tokens is not None) > 1:
            raise BudgetError(f"{self.name}: give one of r, keep_ratio and keep_tokens")

    @property
    def _has_budget(self) -> bool:
        return self.r is not None or self.keep_ratio is not None or self.keep_tokens is not None

    def check_budget(self, shape: ModelShape) -> None:
        if self.r is not None:
            layer_counts(shape.encoder_layers, self.r)  # complains of what does not fit
        elif self._has_budget:
            super().check_budget(shape)
        elif self.needs_budget:
            raise BudgetError(f"{self.name} needs a budget: r=13, keep_ratio=0.25 or keep_tokens=64, for example")

    def schedule(self, layers: int, patches: int, protected: int) -> list[int]:
        if not self._has_budget:
            return self.published(layers, patches)
        if self.r is not None:
            return layer_counts(layers, self.r)
        return equal_steps(self.name, layers, patches, self.patches_left(patches))

    def published(self, layers: int, patches: int) -> list[int]:
        """The schedule without a budget, of methods that have one."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DropInEveryLayer(InEveryLayer):
    """A method that drops a few patches in every layer. Those that stay are as they were, in their order."""

    drops = True

    def reduce(self, tokens: LayerTokens) -> Reduction | None:
        remove = min(tokens.remove, tokens.patches // 2)
        return tokens.keep(self.left(tokens, tokens.patches - remove)) if remove else None

    @abstractmethod
    def left(self, tokens: LayerTokens, count: int) -> Tensor:
        """The patches that stay, as `LayerTokens.keep` takes them: `count` of each image."""


def depths(layers: tuple[int, ...] | None, published: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The layers that a method names, or those published for 12 layers, at the same relative depth of so many.

    Raises ConfigError if a layer is named that there is not.
    """
    if layers is None:
        return tuple(sorted({round(layer * depth / 12) for layer in published if layer * depth >= 6}))
    if not layers or max(layers) >= depth:
        raise ConfigError(f"layers={layers}: the vision encoder has layers 0..{depth - 1}")
    return tuple(sorted(set(layers)))


def placed(steps: list[int], layers: tuple[int, ...], depth: int) -> list[int]:
    """A schedule of so many layers with these steps in some of them and none in the others."""
    by_layer = dict(zip(layers, steps, strict=True))
    return [by_layer.get(layer, 0) for layer in range(depth)]


def equal_steps(name: str, layers: int, patches: int, left: int) -> list[int]:
    """A schedule that leaves exactly so many patches, by steps that differ by at most one.

    A layer takes away half of its patches at most, so the last steps may be smaller, and the others then larger. The
    larger ones of two sizes come first.

    Raises BudgetError if halving in every layer does not suffice.
    """

    def steps(larger: int, first: int) -> list[int]:
        """`larger` in the first so many layers and one less in the others, as far as half of the tokens allow."""
        remaining, found = patches, []
        for layer in range(layers):
            step = min(larger if layer < first else larger - 1, remaining // 2)
            found.append(step)
            remaining -= step
        return found

    remove = patches - left
    if sum(steps(patches, layers)) < remove:
        floor = patches - sum(steps(patches, layers))
        raise BudgetError(
            f"{name} takes away at most half of the patches in a layer, so of {patches} at least {floor} are left "
            f"behind {layers} layers; {left} were asked for",
            floor=floor / patches,
        )
    larger = next(n for n in range(patches + 1) if sum(steps(n, layers)) >= remove)
    first = next(n for n in range(layers + 1) if sum(steps(larger, n)) >= remove)
    return steps(larger, first)
