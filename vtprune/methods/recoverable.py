# SPDX-License-Identifier: Apache-2.0
"""Recoverable Compression: keep tokens by visual score, recover tokens by the question, merge the rest."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from vtprune.devices import read
from vtprune.errors import ConfigError
from vtprune.methods.base import BeforeLLM
from vtprune.ops.largest_remainder import apportion
from vtprune.ops.recoverable_compression import counts_within, dynamic_counts, main_tokens, recover, text_scores
from vtprune.signals import EncoderKeys, EncoderOutput, EncoderSaliency, JointSpace, TextEmbeddings
from vtprune.tokens import Merging, ModelShape, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Recoverable(BeforeLLM):
    """Keeps tokens by visual score, and recovers others by their similarity to the question (arXiv 2409.01179).

    Stage: before the LLM. The share of scores that are outliers, by their local outlier factor, gives the number of
    kept tokens and of recovered tokens. Of the rest, the best tokens are centres, which gather similar tokens, and one
    more token is the sum of the others. The visual score is the attention of the encoder's CLS token in its last layer,
    or, without a CLS token, the attention that a token receives there. The text score compares the projected features
    with the mean of the question's embeddings in the LLM's space. With a text tower, it compares features of the
    encoder's last layer with the question in CLIP's own space.
    Deviations: attention is averaged over heads (the reference handles all heads as one); there is a text score without
    a text tower (the reference always runs a whole CLIP beside the model); the text tower reads the question, at the
    end of the text (the reference gives it the first line of the prompt, which is the system's, and reads its output at
    the end of the padding); features are gathered after the projector, not before it; two defects are corrected (see
    reference_quirks); tokens keep their places (in the reference they do not); with a budget, which the reference does
    not have, the three numbers are scaled to meet it.

    Fields
        keep_ratio, keep_tokens: optional; without them, the outliers decide how many tokens stay.
        layer: encoder layer of attention and keys, 0-based; default None: the last layer.
        members: number of tokens that each centre gathers, >= 0, default 32.
        text_weight: weight of the text score against the similarity to the centre, >= 0, default 50.
        outlier_factor: local outlier factor above which a score is an outlier, > 0, default 1.5.
        gather: whether the rest is gathered, default True; False drops it.
        text_tower: the CLIP that the model's vision encoder comes from; its text tower then reads the question. Folder
            or hub id of a transformers CLIP, or "open_clip:NAME@WEIGHTS" with a model name and a file or tag
            (`pip install "vtprune[clip]"`). The question is the session's `text`, or the text after the image if the
            model's checkpoint has a tokenizer. Default None: similarity in the LLM's space.
        reference_quirks: repeat both defects of the reference: the number of centres is a share of the encoder's width,
            and the compared keys are those of the image's first tokens. Default False.
    """

    name: ClassVar[str] = "recoverable"
    signal: ClassVar[str] = "attention and keys in the encoder, similarity to the question"
    paper: ClassVar[str] = "arXiv 2409.01179"
    text_aware: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True
    needs_budget: ClassVar[bool] = False

    layer: Annotated[int, Ge(0)] | None = None
    members: Annotated[int, Ge(0)] = 32
    text_weight: Annotated[float, Ge(0)] = 50.0
    outlier_factor: Annotated[float, Gt(0)] = 1.5
    gather: bool = True
    text_tower: str | None = None
    reference_quirks: bool = False

    def requests(self, shape: ModelShape) -> tuple[Hashable, ...]:
        """The signals: first for the visual score, then the keys, then for the text score."""
        layer = shape.encoder_layers - 1 if self.layer is None else self.layer
        if layer >= shape.encoder_layers:
            raise ConfigError(f"recoverable: layer={layer} must be within 0..{shape.encoder_layers - 1}")
        attention = EncoderSaliency(layer)
        if self.text_tower is None:
            return attention, EncoderKeys(layer), TextEmbeddings()
        return attention, EncoderKeys(layer), EncoderOutput(shape.encoder_layers - 1), JointSpace(self.text_tower)

    def signals(self, shape: ModelShape):
        return self.requests(shape)

    def select(self, tokens: VisualTokens) -> Selection:
        visual, keys, *textual = (tokens[request] for request in self.requests(tokens.shape))
        keep, merging = torch.zeros_like(tokens.valid), Merging(tokens)
        groups, scores, counts = [], [], []
        for group, length, k in tokens.each():
            if not length:
                continue
            values, count = tokens.features[group, :length], None if k < 0 else k
            pair = visual[group, :length].float(), self._text_scores(group, values, *textual)
            if not self.gather:
                keep[group, :length] = self._main(*pair, values.shape[1], count)
                continue
            groups.append((group, length))
            scores.append(pair)
            options = {"outlier_factor": self.outlier_factor, "reference_quirks": self.reference_quirks}
            counts.append(counts_within(*pair, keys.shape[2], count, **options))
        if not self.gather:
            return Selection(keep)
        # The counts of all groups are read together: an accelerator is waited for once.
        for (group, length), pair, numbers in zip(groups, scores, read(*counts), strict=True):
            values = tokens.features[group, :length]
            merged = recover(
                values,
                keys[group, :length],
                *pair,
                numbers.tolist(),
                members=self.members,
                text_weight=self.text_weight,
                reference_quirks=self.reference_quirks,
            ).in_place(values[None])
            merging.put(group, length, *(part[0] for part in merged))
        return merging.selection

    def _text_scores(self, group: int, values: Tensor, *textual) -> Tensor:
        """(tokens,) similarity to the question, for a group with features (tokens, dim)."""
        if self.text_tower is None:
            # A sum has the direction of the mean, and also works without any text.
            return text_scores(textual[0][group].float().sum(0), values)
        outputs, (questions, projection) = textual
        patches = outputs[group, : len(values)].to(projection) @ projection.T
        return text_scores(questions[group].float(), patches.float())

    def _main(self, visual: Tensor, text: Tensor, dim: int, k: int | None) -> Tensor:
        """(tokens,) bool: the tokens that stay if the rest is dropped."""
        counts = dynamic_counts(visual, text, dim, outlier_factor=self.outlier_factor)[:2]
        if k is not None:
            counts = apportion(k, counts, torch.full_like(counts, len(visual)))
        return main_tokens(visual, text, *counts)
