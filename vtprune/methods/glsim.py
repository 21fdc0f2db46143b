# SPDX-License-Identifier: Apache-2.0
"""GLSim: keep the patches most similar to the image as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtprune.methods.base import BeforeLLM, Scorer, require_cls
from vtprune.ops.similarity import similarity_to
from vtprune.signals import EncoderRecord, EncoderSignal, EncoderView, Taps
from vtprune.tokens import ModelShape, VisualTokens


@dataclass(frozen=True)
class ClsSimilarity(EncoderSignal):
    """(groups, tokens): similarity of each visual token to the CLS token in the encoder layer that the projector reads.

    If several patches become one visual token, it is their mean similarity.
    """

    metric: Literal["cosine", "l1", "l2"] = "cosine"
    """See `vtprune.ops.similarity`."""

    def taps(self, shape: ModelShape) -> Taps:
        return Taps(outputs=(shape.feature_layer,))

    def read_encoded(self, view: EncoderView) -> Tensor:
        def similarity(record: EncoderRecord) -> Tensor:
            output = record.outputs[view.shape.feature_layer]
            return similarity_to(output[:, 0], output, self.metric)[..., None]

        return view.per_token(similarity)[..., 0]


@dataclass(frozen=True, kw_only=True)
class GLSim(Scorer, BeforeLLM):
    """Keeps the tokens most similar to the encoder's CLS token (arXiv 2407.12891); no attention is looked at.

    Stage: before the LLM. The encoder needs a CLS token. The score was made to find the crop that a fine-tuned
    classifier looks at a second time (8 patches). Encoders trained on captions may store global information in
    background patches. Deviation: both features are the output of the layer that the projector reads, without the
    encoder's last normalisation.

    Fields
        metric: "cosine" (default); or "l1" or "l2", by which small mean absolute or squared differences are similar.
    """

    name: ClassVar[str] = "glsim"
    signal: ClassVar[str] = "similarity to CLS in the encoder"
    paper: ClassVar[str] = "arXiv 2407.12891"

    metric: Literal["cosine", "l1", "l2"] = "cosine"

    def signals(self, shape: ModelShape):
        require_cls(self.name, "ranks by similarity to", shape)
        return (ClsSimilarity(self.metric),)

    def scores(self, tokens: VisualTokens) -> Tensor:
        return tokens[ClsSimilarity(self.metric)]
