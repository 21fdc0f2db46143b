# SPDX-License-Identifier: Apache-2.0
"""CDPruner: keep a subset of the tokens that is diverse and relevant to the question."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.methods.base import BeforeLLM
from vtprune.ops.determinantal import conditional_diversity, mean_similarity, scaled_relevance
from vtprune.signals import EncoderOutput, JointSpace, TextEmbeddings
from vtprune.tokens import ModelShape, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class CDPruner(BeforeLLM):
    """Greedy choice under a determinantal point process (arXiv 2506.10967).

    The kernel of two tokens is the cosine of their projected features times the relevance of both to the question.
    Stage: before the LLM. With a text tower, relevance is *minus* the cosine of the question with the output of the
    encoder layer that the projector reads, both in CLIP's own space, as in the reference: in CLIP, patches that the
    text describes have the lowest similarity to it. Without a text tower, relevance is the mean cosine of the projected
    features with the question's embeddings in the LLM's space, with its sign unchanged. This is a choice made here; the
    reference needs a CLIP.
    Deviations: relevance is scaled to the range from 0 to 1 in each group (in the reference over all crops of a batch);
    if all tokens are equally relevant, only diversity decides (the reference divides by zero); tokens that the chosen
    tokens explain completely come last, by relevance (the reference takes the root of a negative number); a question
    longer than the text tower's context is cut off (the reference averages over pieces); newline tokens are dropped
    with the last token of their line (the reference always keeps them). Published settings: 128 or 64 tokens of 576, 32
    of each tile.

    Fields
        text_tower: the CLIP that the model's vision encoder comes from; its text tower then reads the question. Folder
            or hub id of a transformers CLIP, or "open_clip:NAME@WEIGHTS" with a model name and a file or tag
            (`pip install "vtprune[clip]"`). The question is the session's `text`, or the text after the image if the
            model's checkpoint has a tokenizer. Default None: similarity in the LLM's space.
        reference_quirks: scale relevance over all crops together, also those of other samples; default False.
    """

    name: ClassVar[str] = "cdpruner"
    signal: ClassVar[str] = "similarity, relevance to the question"
    paper: ClassVar[str] = "arXiv 2506.10967"
    text_aware: ClassVar[bool] = True

    text_tower: str | None = None
    reference_quirks: bool = False

    def requests(self, shape: ModelShape) -> tuple[Hashable, ...]:
        """The signals for relevance; diversity needs only the features."""
        if self.text_tower is None:
            return (TextEmbeddings(),)
        return EncoderOutput(shape.feature_layer, normalised=True), JointSpace(self.text_tower)

    def signals(self, shape: ModelShape):
        return self.requests(shape)

    def select(self, tokens: VisualTokens) -> Selection:
        relevance = scaled_relevance(self._scores(tokens), tokens.valid, together=self.reference_quirks)
        return Selection(conditional_diversity(tokens.features, relevance, tokens.valid, tokens.host.budget))

    def _scores(self, tokens: VisualTokens) -> Tensor:
        """(groups, tokens), larger is more relevant."""
        textual = [tokens[request] for request in self.requests(tokens.shape)]
        if self.text_tower is None:
            return mean_similarity(tokens.features, textual[0])
        outputs, (questions, projection) = textual
        patches = outputs.float() @ projection.float().T
        return -mean_similarity(patches, [question[None] for question in questions])
