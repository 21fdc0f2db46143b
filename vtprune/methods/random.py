# SPDX-License-Identifier: Apache-2.0
"""Baseline: keep a random subset of the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge
from torch import Tensor

from vtprune.devices import send
from vtprune.methods.base import BeforeLLM, Scorer
from vtprune.ops.seeded_random import seeded_uniform
from vtprune.signals import SampleKeys
from vtprune.tokens import ModelShape, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Random(Scorer, BeforeLLM):
    """Keeps a uniformly random subset of each image's tokens.

    Stage: before the LLM. The draw depends on the seed, the image's pixels and the prompt's text, but not on other
    samples of the batch or on the global generators.

    Fields
        seed: seed of the draw, >= 0, default 0.
    """

    name: ClassVar[str] = "random"
    signal: ClassVar[str] = "none"

    seed: Annotated[int, Ge(0)] = 0

    def signals(self, shape: ModelShape):
        return (SampleKeys(),)

    def scores(self, tokens: VisualTokens) -> Tensor:
        return send(seeded_uniform(tokens[SampleKeys()], self.seed, tokens.valid.shape[1]), tokens.valid.device)
