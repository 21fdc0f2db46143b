# SPDX-License-Identifier: Apache-2.0
"""Base classes of methods that cut inside the LLM by a schedule: shares of the tokens kept, from layer to layer."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge
from torch import Tensor

from vtprune import budget
from vtprune.errors import ConfigError
from vtprune.methods.base import InLLM, Share
from vtprune.tokens import ModelShape


@dataclass(frozen=True, kw_only=True)
class Progressive(InLLM):
    """An `InLLM` method with a published schedule: shares of the entering tokens kept after each cut.

    Without a budget the schedule holds as it is. With one, it is scaled to meet it (`vtprune.budget.schedule_counts`).
    Subclasses state `cuts` and `shares`.
    """

    needs_budget: ClassVar[bool] = False
    published_depth: ClassVar[int] = 32

    @abstractmethod
    def shares(self) -> tuple[float, ...]:
        """Share of the entering visual tokens alive after each cut."""

    def count(self, entering: int, share: float) -> int:
        """Tokens alive for an exact share; truncates unless the method's reference rounds otherwise."""
        return int(entering * share)

    def resolve_layers(
        self, layers: tuple[int, ...] | None, published: tuple[int, ...], shape: ModelShape
    ) -> tuple[int, ...]:
        """The user's layers, checked against the model, or the published ones rescaled to its depth."""
        if layers is None:
            return budget.rescale_layers(published, self.published_depth, shape.decoder_layers)
        if list(layers) != sorted(set(layers)) or not 1 <= layers[0] <= layers[-1] < shape.decoder_layers:
            raise ConfigError(
                f"{self.name}: layers {layers} must ascend within 1..{shape.decoder_layers - 1} "
                f"for a model of {shape.decoder_layers} decoder layers"
            )
        return layers

    def check_budget(self, shape: ModelShape) -> None:
        cuts = self.cuts(shape)
        if self.keep_ratio is not None:
            budget.check_floor(self.name, cuts, shape.decoder_layers, self.keep_ratio)

    def budgets(self, shape: ModelShape, entering: Tensor, crops: Tensor) -> Tensor:
        shares, samples = self.shares(), zip(entering.tolist(), crops.tolist(), entering.tolist(), strict=True)
        return self.scheduled(shape, shares, samples, lambda n: [self.count(n, share) for share in shares])


@dataclass(frozen=True, kw_only=True)
class Staged(Progressive):
    """A progressive method whose layers and schedule are fields. Subclasses state `published_layers` and a default
    `schedule`."""

    published_layers: ClassVar[tuple[int, ...]]

    layers: tuple[int, ...] | None = None
    schedule: tuple[Share, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        cuts = len(self.published_layers if self.layers is None else self.layers)
        if len(self.schedule) != cuts or any(a < b for a, b in pairwise(self.schedule)):
            raise ConfigError(f"{self.name}: schedule={self.schedule} must be {cuts} shares that do not increase")

    def cuts(self, shape: ModelShape) -> tuple[int, ...]:
        return self.resolve_layers(self.layers, self.published_layers, shape)

    def shares(self) -> tuple[float, ...]:
        return self.schedule


@dataclass(frozen=True, kw_only=True)
class CutOnce(Progressive):
    """A progressive method with one cut, whose layer and share are fields. Subclasses state a default `share`."""

    published_layer: ClassVar[int] = 2

    layer: Annotated[int, Ge(1)] | None = None
    share: Share

    def cuts(self, shape: ModelShape) -> tuple[int, ...]:
        return self.resolve_layers(None if self.layer is None else (self.layer,), (self.published_layer,), shape)

    def shares(self) -> tuple[float, ...]:
        return (self.share,)

    def count(self, entering: int, share: float) -> int:
        return round(entering * share)


@dataclass(frozen=True, kw_only=True)
class Reviving(Progressive):
    """A progressive method whose cuts are made anew for every token that is generated.

    At a cut, `select` chooses among the visual tokens that the layer before could see, by the same budget as in the
    prefill; what an earlier choice left out may come back, computed from where it was left. While decoding,
    `tokens.features` are the cached keys of the layer before, (samples, tokens, kv heads * head dim), and
    LastQueryAttention of that layer is the only signal. Separators (newline tokens) stay. Original positions only.
    """

    stage = "in_llm, decode"

    positions: Literal["original"] = "original"
