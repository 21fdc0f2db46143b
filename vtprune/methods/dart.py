# SPDX-License-Identifier: Apache-2.0
"""DART: what is least like a few pivots of image and text stays, the duplicates go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from vtprune.attention import LayerAttention
from vtprune.methods.base import CutOnce, Share
from vtprune.ops.pivots import leading, unlike_pivots
from vtprune.signals import LayerSignal, LayerView
from vtprune.stages.layout import take_columns
from vtprune.tokens import ModelShape, Selection, VisualTokens


@dataclass(frozen=True)
class NormedStates(LayerSignal):
    """A pair, (groups, tokens, dim) and (groups, text tokens, dim): what enters the next decoder layer, put through the
    LLM's last normalisation; of the visual tokens, and of the text after the last of them."""

    def read_layer(self, view: LayerView) -> tuple[Tensor, Tensor]:
        normed, (rows, _) = view.normed(), view.text_rows()
        return view.groups.gather(normed), take_columns(normed, rows)


@dataclass(frozen=True)
class KeyNorms(LayerSignal):
    """A pair, (groups, tokens) and (groups, text tokens) float32: L1 norms of the keys, positions applied, in the
    decoder layer before the cut; of the visual tokens, and of the text after the last of them, -1 for padding."""

    def attends(self, cut: int) -> tuple[int, ...]:
        return (cut - 1,)

    def read_layer(self, view: LayerView) -> tuple[Tensor, Tensor]:
        norms = key_norms(view.attention(view.layer - 1))
        rows, text = view.text_rows()
        # Where no text follows, the row is a visual token's.
        text = (text & ~view.visual.gather(1, rows)).to(norms.device)
        return view.groups.gather(norms), take_columns(norms, rows).masked_fill(~text, -1)


def key_norms(attention: LayerAttention) -> Tensor:
    """(batch, n) float32: L1 norm of the key of every column, all heads together."""
    # Its position turns a key, which changes this norm.
    return attention.keys().float().abs().sum((1, 3))


@dataclass(frozen=True, kw_only=True)
class DART(CutOnce):
    """Drops visual tokens once, before layer K, that resemble pivots of the image and of the text (arXiv 2502.11494).

    Stage: inside the LLM. Pivots are the visual tokens, and the tokens of the text after the last of them, whose keys
    in layer K-1 have the largest L1 norm. The visual pivots stay; then each pivot chooses its share of the tokens with
    the lowest cosine to it, of states that went through the LLM's last normalisation. Attention is not looked at.
    Original positions are kept, as in the reference.
    Deviations: the budget is met exactly (the reference keeps the visual pivots on top of it); visual pivots choose
    first, then those of the text, each by falling norm (the reference's order is that of a hash table); samples
    without text after the image have visual pivots alone; batches and several images work.

    Fields
        layer: K, 0-based, in 1..depth-1; default None: 2 of 32 layers, rescaled to the model's depth, at least 1.
        share: share of the visual tokens alive from layer K on when no budget is given, in [0, 1], default 2/9 (128
            of 576).
        image_pivots: >= 1, default 4.
        text_pivots: >= 0, default 4.
    """

    name: ClassVar[str] = "dart"
    signal: ClassVar[str] = "similarity in the LLM, length of keys"
    paper: ClassVar[str] = "arXiv 2502.11494"

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
