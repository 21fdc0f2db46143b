# SPDX-License-Identifier: Apache-2.0
"""MMTok: keep the subset of the tokens that best covers the question and the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt

from vtprune.methods.base import BeforeLLM
from vtprune.ops.coverage import max_coverage
from vtprune.signals import EncoderFeatures, TextEmbeddings
from vtprune.tokens import ModelShape, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class MMTok(BeforeLLM):
    """Greedy maximum coverage of text tokens and of all visual tokens (arXiv 2508.18264).

    Stage: before the LLM. Text-to-visual similarity is computed in the LLM's space, visual-to-visual similarity in the
    encoder's space. Deviations from the reference: the question is read from the tokens of the prompt, unless the
    session has a `text` (a string then goes through the paper's stop-word filter); visual features are those that the
    projector reads, from any encoder layer; the selection is lazy, with the same result.

    Fields
        alpha: weight of visual coverage against text coverage, >= 0, default 0.5.
        tau_text: softmax temperature of text-to-visual similarity, > 0, default 0.02 (published: 0.01 for Qwen2.5-VL).
        tau_visual: softmax temperature of visual-to-visual similarity, > 0, default 0.2.
    """

    name: ClassVar[str] = "mmtok"
    signal: ClassVar[str] = "coverage of text and image"
    paper: ClassVar[str] = "arXiv 2508.18264"
    text_aware: ClassVar[bool] = True

    alpha: Annotated[float, Ge(0)] = 0.5
    tau_text: Annotated[float, Gt(0)] = 0.02
    tau_visual: Annotated[float, Gt(0)] = 0.2

    def signals(self, shape: ModelShape):
        return EncoderFeatures(), TextEmbeddings(keywords=True)

    def select(self, tokens: VisualTokens) -> Selection:
        encoder, texts = tokens[EncoderFeatures()], tokens[TextEmbeddings(keywords=True)]
        kept = [
            max_coverage(
                tokens.features[g, :length],
                encoder[g, :length],
                texts[g],
                k,
                alpha=self.alpha,
                tau_text=self.tau_text,
                tau_visual=self.tau_visual,
            )
            for g, length, k in tokens.each()
        ]
        return Selection.of_indices(tokens, kept)
