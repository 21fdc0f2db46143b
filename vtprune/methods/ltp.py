# SPDX-License-Identifier: Apache-2.0
"""LTP: drop a token when it receives too little attention in the layer before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge
from torch import Tensor

from vtprune import budget
from vtprune.methods.base import InLLM
from vtprune.ops.attention import attention_received
from vtprune.ops.attention_threshold import above_threshold, rising_threshold
from vtprune.ops.selection import top_k_mask
from vtprune.signals import LayerSignal, LayerView
from vtprune.tokens import ModelShape, Selection, VisualTokens


@dataclass(frozen=True)
class AttentionShare(LayerSignal):
    """(groups, tokens): attention that each visual token receives in the decoder layer before the cut, from all tokens
    of the prompt and over all heads, as a multiple of the average over tokens."""

    of_padded: bool = False
    """Instead, divide the sum over the remaining tokens of the prompt by its original length, padding included."""

    def attends(self, cut: int) -> tuple[int, ...]:
        return (cut - 1,)

    def read_layer(self, view: LayerView) -> Tensor:
        attention = view.attention(view.layer - 1)
        queries, keys, scores = attention.everything()
        real = attention.counted(view.real)
        received = attention_received(queries, keys, mask=attention.reached, valid=real, **scores)
        share = received[:, -real.shape[1] :] * real.sum(1, keepdim=True)
        if self.of_padded:
            share = share / view.padded_length.to(share.device)
        return view.groups.gather(share)


@dataclass(frozen=True, kw_only=True)
class LTP(InLLM):
    """Drops visual tokens on the input of every layer by the attention that they receive in the layer before.

    Learned Token Pruning (arXiv 2107.00910) with the fixed thresholds from which its training starts; nothing is
    learned here. Stage: inside the LLM, on the input of every layer but the first. The score of a token is the
    attention that it receives from all tokens of the prompt, over all heads. Positions are kept.
    Deviations: the method was made for text encoders; here it prunes the visual tokens of a causal decoder, where early
    tokens are seen by more tokens and so receive more attention; tokens are removed, not masked; thresholds are
    multiples of the average score, which is one over the number of tokens, so they mean the same at any length (the
    reference divides by the padded length, and its thresholds are absolute).

    Fields
        keep_ratio, keep_tokens: optional. With one of them, tokens are dropped in equal steps until it is met, those
            that receive least attention first, and thresholds are not used.
        threshold: value of the threshold behind the last layer, as a multiple of the average score, >= 0, default 1.28
            (the published 0.01 at 128 tokens). It rises in even steps from 0 at the first layer.
        reference_quirks: as in the reference, the threshold is absolute at any length (no score reaches 1.28 then; 0.01
            was published), and scores are means over the padded prompt, so padding lowers them. Default False.
    """

    name: ClassVar[str] = "ltp"
    signal: ClassVar[str] = "attention in the LLM, from all tokens"
    paper: ClassVar[str] = "arXiv 2107.00910"
    text_aware: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True
    needs_budget: ClassVar[bool] = False

    threshold: Annotated[float, Ge(0)] = 1.28
    reference_quirks: bool = False
    positions: Literal["original", "compact"] = "original"

    def cuts(self, shape: ModelShape) -> tuple[int, ...]:
        return tuple(range(1, shape.decoder_layers))

    def check_budget(self, shape: ModelShape) -> None:
        if self.keep_ratio is not None:
            budget.check_floor(self.name, self.cuts(shape), shape.decoder_layers, self.keep_ratio)

    def budgets(self, shape: ModelShape, entering: Tensor, crops: Tensor) -> Tensor:
        cuts = self.cuts(shape)
        shares = tuple(1 - cut / shape.decoder_layers for cut in cuts)
        samples = zip(entering.tolist(), crops.tolist(), entering.tolist(), strict=True)
        return self.scheduled(shape, shares, samples, lambda n: [-1] * len(cuts))

    def signals(self, shape: ModelShape):
        return (AttentionShare(of_padded=self.reference_quirks),)

    def select(self, tokens: VisualTokens) -> Selection:
        received = tokens[AttentionShare(of_padded=self.reference_quirks)]
        if self.keep_ratio is not None or self.keep_tokens is not None:
            return Selection(top_k_mask(received, tokens.valid, tokens.budget))
        # The operation takes the average over the tokens that it is given.
        scores = received if self.reference_quirks else received / tokens.lengths.clamp(min=1)[:, None]
        threshold = rising_threshold(self.threshold, tokens.layer - 1, tokens.shape.decoder_layers)
        return Selection(above_threshold(scores, tokens.valid, threshold, reference_quirks=self.reference_quirks))
