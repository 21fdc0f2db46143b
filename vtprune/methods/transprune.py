# SPDX-License-Identifier: Apache-2.0
"""TransPrune: keep the tokens that layers change most, and that the question attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.methods.base import Scorer, Share
from vtprune.methods.schedules import Staged
from vtprune.ops.token_transition import token_transition
from vtprune.signals import InstructionAttention, LayerSignal, LayerView
from vtprune.tokens import ModelShape, VisualTokens


@dataclass(frozen=True)
class Transition(LayerSignal):
    """(groups, tokens): token transition variation of attention and MLP blocks, summed over decoder layers.

    At each cut, the sum runs from the first of these layers.
    """

    layers: tuple[int, ...]
    """0-based decoder layers to measure."""

    def measures(self) -> tuple[int, ...]:
        return self.layers

    def measure(self, inputs: Tensor, outputs: Tensor, counted: Tensor) -> Tensor:
        return token_transition(inputs, outputs, counted)

    def read_layer(self, view: LayerView) -> Tensor:
        return view.groups.gather(view.measured(self))


@dataclass(frozen=True, kw_only=True)
class TransPrune(Scorer, Staged):
    """Drops visual tokens in stages by token transition variation and instruction-guided attention (arXiv 2507.20630).

    Stage: inside the LLM. The score of a token is the sum of two shares: its share of the transition variation, summed
    over the layers before the cut, and its share of the attention that the text after the image pays in the layer that
    runs next. Positions are renumbered after every stage, as in the reference. Deviations: the softmax of the
    transition runs over the tokens of each sample (in the reference over the whole batch, padding included, which is
    equal for one sample); everything is computed in float32; grouped-query attention, batches and several images work.

    Fields
        layers: cuts on the input of these decoder layers, 0-based, ascending; default None: (7, 9, 12) of 32 layers,
            rescaled to the model's depth.
        schedule: share of the entering visual tokens that is left after each cut, in [0, 1], not increasing; default
            (0.875, 0.625, 0.125). With a budget the schedule is scaled to meet it.
        measure: decoder layers whose transitions are summed; default None: from the layer before the first cut to the
            layer before the last cut (6 to 11 of 32).
        score: "both" (default), "ttv" (transition variation alone) or "iga" (attention alone).
    """

    name: ClassVar[str] = "transprune"
    signal: ClassVar[str] = "token transition, attention in the LLM"
    paper: ClassVar[str] = "arXiv 2507.20630"
    text_aware: ClassVar[bool] = True
    published_layers: ClassVar[tuple[int, ...]] = (7, 9, 12)

    score: Literal["both", "ttv", "iga"] = "both"
    schedule: tuple[Share, ...] = (0.875, 0.625, 0.125)
    measure: tuple[int, ...] | None = None
    positions: Literal["original", "compact"] = "compact"

    def measured(self, shape: ModelShape) -> tuple[int, ...]:
        """Decoder layers whose transitions are summed."""
        cuts = self.cuts(shape)
        layers = tuple(range(cuts[0] - 1, cuts[-1])) if self.measure is None else self.measure
        if not layers or layers[0] >= cuts[0] or min(layers) < 0:
            raise ConfigError(f"transprune: measure={layers} must start before the first cut, at layer {cuts[0]}")
        return layers

    def signals(self, shape: ModelShape):
        if self.score == "iga":
            return (InstructionAttention(),)
        transition = Transition(self.measured(shape))
        return (transition,) if self.score == "ttv" else (transition, InstructionAttention())

    def scores(self, tokens: VisualTokens) -> Tensor:
        return sum(_shares(tokens[request]) for request in self.signals(tokens.shape))


def _shares(values: Tensor) -> Tensor:
    """Each row divided by its sum. 1e-8, as in the reference, avoids a division by zero."""
    return values / (values.sum(1, keepdim=True) + 1e-8)
