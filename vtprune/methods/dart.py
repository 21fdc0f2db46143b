# SPDX-License-Identifier: Apache-2.0
"""DART: keep the tokens least similar to a few pivot tokens of image and text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from vtprune.attention import LayerAttention
from vtprune.methods.base import Share
from vtprune.methods.schedules import CutOnce
from vtprune.ops.pivot_tokens import leading, unlike_pivots
from vtprune.signals import LayerSignal, LayerView
from vtprune.stages.layout import take_columns
from vtprune.tokens import ModelShape, Selection, VisualTokens


@dataclass(frozen=True)
class NormedStates(LayerSignal):
    """Two tensors, (groups, tokens, dim) and (groups, text tokens, dim): the input of the next decoder layer after the
    LLM's last normalisation, for the visual tokens and for the text after the last visual token."""

    def read_layer(self, view: LayerView) -> tuple[Tensor, Tensor]:
        normed, (rows, _) = view.normed(), view.text_rows()
        return view.groups.gather(normed), take_columns(normed, rows)


@dataclass(frozen=True)
class KeyNorms(LayerSignal):
    """Two tensors, (groups, tokens) and (groups, text tokens) float32: L1 norms of the keys, positions applied, in the
    decoder layer before the cut, for the visual tokens and for the text after the last visual token. -1 for padding of
    the text."""

    def attends(self, cut: int) -> tuple[int, ...]:
        return (cut - 1,)

    def read_layer(self, view: LayerView) -> tuple[Tensor, Tensor]:
        norms = key_norms(view.attention(view.layer - 1))
        rows, text = view.text_rows()
        # If no text follows, the row belongs to a visual token.
        text = (text & ~view.visual.gather(1, rows)).to(norms.device)
        return view.groups.gather(norms), take_columns(norms, rows).masked_fill(~text, -1)


def key_norms(attention: LayerAttention) -> Tensor:
    """(batch, n) float32: L1 norm of the key of every column, over all heads."""
    # Positions must be applied, because a rotation changes the L1 norm.
    return torch.linalg.vector_norm(attention.keys(), ord=1, dim=-1, dtype=torch.float32).sum(1)


@dataclass(frozen=True, kw_only=True)
class DART(CutOnce):
    """Drops visual tokens once, before layer K, that resemble pivots of the image and of the text (arXiv 2502.11494).

    Stage: inside the LLM. Pivots are the visual tokens and the text tokens after the last visual token whose keys in
    layer K-1 have the largest L1 norm. The visual pivots stay. Then each pivot chooses its part of the budget: the
    tokens whose states, after the LLM's last normalisation, have the lowest cosine to its own. Attention is not used.
    Original positions are kept, as in the reference.
    Deviations: the budget is met exactly (the reference keeps the visual pivots in addition); visual pivots choose
    first and text pivots second, each by falling norm (the reference has the order of a hash table); samples without
    text after the image have only visual pivots; batches and several images work.

    Fields
        layer: K, 0-based, in 1..depth-1; default None: 2 of 32 layers, rescaled to the model's depth, at least 1.
        share: share of the visual tokens that is left from layer K on if no budget is given, in [0, 1], default 2/9
            (128 of 576).
        image_pivots: number of visual pivots, >= 1, default 4.
        text_pivots: number of text pivots, >= 0, default 4.
    """

    name: ClassVar[str] = "dart"
    signal: ClassVar[str] = "similarity in the LLM, length of keys"
    paper: ClassVar[str] = "arXiv 2502.11494"
    text_aware: ClassVar[bool] = True

    share: Share = 2 / 9
    image_pivots: Annotated[int, Ge(1)] = 4
    text_pivots: Annotated[int, Ge(0)] = 4
    positions: Literal["original", "compact"] = "original"

    def signals(self, shape: ModelShape):
        return (NormedStates(), KeyNorms())

    def select(self, tokens: VisualTokens) -> Selection:
        states, text_states = tokens[NormedStates()]
        norms, text_norms = tokens[KeyNorms()]
        image, real = leading(norms, tokens.valid, self.image_pivots)
        real &= torch.arange(image.shape[1], device=real.device) < tokens.budget[:, None]
        chosen = torch.zeros_like(tokens.valid).scatter(1, image, real)
        text, text_real = leading(text_norms, text_norms >= 0, self.text_pivots)
        pivots = torch.cat([take_columns(states, image), take_columns(text_states, text)], 1)
        real = torch.cat([real, text_real], 1)
        return Selection(unlike_pivots(states, pivots, real, chosen, tokens.valid, tokens.budget))
