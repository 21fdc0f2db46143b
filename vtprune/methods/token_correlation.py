# SPDX-License-Identifier: Apache-2.0
"""Token correlation: keep global tokens of a deep encoder layer, and local tokens of an early one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from vtprune.devices import send
from vtprune.errors import ConfigError
from vtprune.methods.base import BeforeLLM, require_cls
from vtprune.ops.redundancy import global_and_local, information_density
from vtprune.ops.seeded_random import seeded_uniform
from vtprune.signals import ClsAttention, EncoderKeys, SampleKeys
from vtprune.tokens import ModelShape, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class TokenCorrelation(BeforeLLM):
    """Keeps global tokens, to which CLS attends unusually much, and local tokens, by the density of the crop.

    Inspired by Token-level Correlation-guided Compression (arXiv 2407.14439). Stage: before the LLM, from the encoder.
    The method was made for documents that are cut into crops. Global tokens are those whose CLS attention in a deep
    layer is an outlier. Local tokens are those with the most CLS attention in an early layer. Their number depends on
    the density of the crop: a token is redundant if many other tokens have similar keys, and the density is the share
    of tokens that are not redundant. With a budget, global tokens come first, and local tokens fill it. The encoder
    needs a CLS token.
    Deviation: every default below is a choice made here (the authors have published neither code nor these numbers).

    Fields
        keep_ratio, keep_tokens: optional; without them, all global and local tokens stay.
        local_layer: early encoder layer, 0-based; default None: at a quarter of the depth.
        global_layer: deep encoder layer, 0-based; default None: the layer whose output the projector reads.
        similarity: cosine of keys above which two tokens are similar, in [-1, 1], default 0.9.
        count: number of similar tokens that makes a token redundant, >= 1, default 8.
        whiskers: interquartile ranges above the third quartile from which attention is an outlier, >= 0, default 1.5.
        seed: seed for drawing local tokens with probabilities in proportion to their attention, >= 0; default None: no
            draw, the tokens with most attention.
    """

    name: ClassVar[str] = "token_correlation"
    signal: ClassVar[str] = "CLS attention and keys in the encoder"
    paper: ClassVar[str] = "arXiv 2407.14439"
    adaptive: ClassVar[bool] = True
    needs_budget: ClassVar[bool] = False

    local_layer: Annotated[int, Ge(0)] | None = None
    global_layer: Annotated[int, Ge(0)] | None = None
    similarity: Annotated[float, Interval(ge=-1, le=1)] = 0.9
    count: Annotated[int, Ge(1)] = 8
    whiskers: Annotated[float, Ge(0)] = 1.5
    seed: Annotated[int, Ge(0)] | None = None

    def layers(self, shape: ModelShape) -> tuple[int, int]:
        """The early and the deep encoder layer."""
        local = shape.encoder_layers // 4 if self.local_layer is None else self.local_layer
        deep = shape.feature_layer if self.global_layer is None else self.global_layer
        if max(local, deep) >= shape.encoder_layers:
            raise ConfigError(
                f"token_correlation: local_layer={local} and global_layer={deep} must be within "
                f"0..{shape.encoder_layers - 1} for an encoder of {shape.encoder_layers} layers"
            )
        return local, deep

    def signals(self, shape: ModelShape):
        require_cls(self.name, "goes by the attention of", shape)
        layers = self.layers(shape)
        return ClsAttention(layers), EncoderKeys(layers[0]), *(() if self.seed is None else (SampleKeys(),))

    def select(self, tokens: VisualTokens) -> Selection:
        layers = self.layers(tokens.shape)
        local, deep = tokens[ClsAttention(layers)].mean(2).unbind(1)
        keys = tokens[EncoderKeys(layers[0])]
        keep = global_and_local(
            deep,
            local,
            information_density(keys, tokens.valid, similarity=self.similarity, count=self.count),
            tokens.valid,
            None if bool((tokens.host.budget < 0).any()) else tokens.budget,
            whiskers=self.whiskers,
            noise=None if self.seed is None else self._noise(tokens),
        )
        return Selection(keep)

    def _noise(self, tokens: VisualTokens) -> Tensor:
        """(groups, tokens) uniform in (0, 1)."""
        noise = send(seeded_uniform(tokens[SampleKeys()], self.seed, tokens.valid.shape[1]), tokens.valid.device)
        return noise.clamp_min(torch.finfo(noise.dtype).tiny)
