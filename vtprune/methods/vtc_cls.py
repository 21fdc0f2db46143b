# SPDX-License-Identifier: Apache-2.0
"""VTC-CLS: keep the tokens that the vision encoder's CLS token attends to most, summed over its last layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.methods.base import BeforeLLM, Scorer, require_cls
from vtprune.ops.cls_attention import cls_score
from vtprune.signals import ClsAttention
from vtprune.tokens import ModelShape, VisualTokens

PUBLISHED_START, PUBLISHED_DEPTH = 16, 24


@dataclass(frozen=True, kw_only=True)
class VTCCls(Scorer, BeforeLLM):
    """Keeps the tokens with the largest CLS attention, head-averaged and summed over encoder layers (arXiv 2412.05819).

    Stage: before the LLM, from attention in the encoder. Text is not used. The layers run from `start_layer` to the
    layer whose output the projector reads (for LLaVA-1.5 the last but one, as in the reference). The encoder needs a
    CLS token. Deviation: tokens are dropped after the projector and not before it, which changes only the projector's
    (small) cost.

    Fields
        start_layer: first encoder layer of the sum, 0-based, negative from the end; default None: 16 of 24 layers,
            rescaled to the encoder's depth.
    """

    name: ClassVar[str] = "vtc_cls"
    signal: ClassVar[str] = "CLS attention in the encoder"
    paper: ClassVar[str] = "arXiv 2412.05819"

    start_layer: int | None = None

    def layers(self, shape: ModelShape) -> tuple[int, ...]:
        """Encoder layers whose attention is summed."""
        start = self.start_layer
        if start is None:
            start = min(round(PUBLISHED_START * shape.encoder_layers / PUBLISHED_DEPTH), shape.feature_layer)
        layers = tuple(range(shape.encoder_layers)[start : shape.feature_layer + 1])
        if not layers:
            raise ConfigError(f"vtc_cls: start_layer={start} leaves no encoder layer up to {shape.feature_layer}")
        return layers

    def signals(self, shape: ModelShape):
        require_cls(self.name, "ranks by the attention of", shape)
        return (ClsAttention(self.layers(shape)),)

    def scores(self, tokens: VisualTokens) -> Tensor:
        return cls_score(tokens[ClsAttention(self.layers(tokens.shape))])
