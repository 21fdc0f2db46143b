# SPDX-License-Identifier: Apache-2.0
"""What a method may ask the model for: requests, and the cheap way each is answered inside the LLM.

A method announces its requests in `Method.signals()` and looks them up as `tokens[request]`. Attention is never taken
from an eager layer: just the rows asked for are recomputed from queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from vtprune.ops.attention import attention_rows, rotate


@dataclass(frozen=True)
class EncoderFeatures:
    """(groups, tokens, dim): what the projector reads, i.e. the encoder's features of each visual token."""


@dataclass(frozen=True)
class ClsAttention:
    """(groups, layers, heads, tokens): post-softmax attention of the encoder's CLS query over the visual tokens."""

    layers: tuple[int, ...]
    """0-based encoder layers."""


@dataclass(frozen=True)
class AttentionReceived:
    """(groups, tokens): attention that each visual token receives in an encoder layer, the mean over heads and queries.

    For encoders without a CLS token, too. Where several patches become one visual token: their mean.
    """

    layer: int
    """0-based encoder layer."""


@dataclass(frozen=True)
class TextEmbeddings:
    """A list with one (text tokens, dim) tensor a group: input embeddings of the question.

    From the session's `text` if given; otherwise of the prompt's text tokens after the group's last visual token (of
    all its text tokens if none follow), without bos, eos and padding.
    """

    keywords: bool = False
    """Drop stop words from `text` when it is a string, and look its words up one by one."""


@dataclass(frozen=True)
class SampleKeys:
    """A list with one integer a group, a function of its sample's prompt and (before the LLM) its image alone.

    For seeded randomness that does not depend on the rest of the batch.
    """


@dataclass(frozen=True)
class LastQueryAttention:
    """(groups, heads, tokens): attention of the prompt's last token over the visual tokens in a decoder layer."""

    layer: int
    """0-based; must have run: at most the layer before the cut."""


@dataclass(frozen=True)
class InstructionAttention:
    """(groups, tokens): attention of the text after the last visual token over the visual tokens, averaged over heads
    and rows, in the decoder layer that runs next."""


@dataclass(frozen=True)
class Transition:
    """(groups, tokens): token transition variation, attention and MLP sub-blocks, summed over decoder layers.

    TransPrune, arXiv 2507.20630. A later cut sees the sum since the first of these layers.
    """

    layers: tuple[int, ...]
    """0-based decoder layers to measure."""


@dataclass(frozen=True)
class RowContext:
    """Everything that attention rows of one decoder layer need beside its projections."""

    attention: nn.Module
    head_dim: int
    rope: tuple[Tensor, Tensor]
    """cos and sin, (batch | 1, n, rotary dim), of the current columns."""
    real: Tensor
    """(batch, n) bool."""
    past_keys: Tensor | None
    """(batch, kv heads, past, head dim), rotated; None if nothing was cached before."""
    past_real: Tensor | None
    """(batch, past) bool; None if all are real."""
    blocks: Tensor | None = None
    """(batch, n) long: columns of one block, numbered from 0, see one another both ways; None: causal throughout."""
    window: int | None = None
    """How many columns, itself included, a row of a sliding layer looks back on; None for all."""
    window_cuts_blocks: bool = False
    """Whether that holds within a block, too."""


def decoder_attention_rows(queries: Tensor, keys: Tensor, rows: Tensor, context: RowContext) -> Tensor:
    """Attention of chosen query rows over the current columns of one decoder layer.

    queries: (batch, r, heads * head_dim), outputs of `q_proj` for the rows; keys: (batch, n, kv heads * head_dim),
    outputs of `k_proj` for all columns; rows: (batch, r) long, the rows' columns. Returns (batch, heads, r, n) float32;
    mass on cached keys counts in the softmax and is then left out.
    """
    q = rearrange(queries, "b r (h d) -> b h r d", d=context.head_dim)
    k = rearrange(keys, "b n (h d) -> b h n d", d=context.head_dim)
    # Some families normalise each head's queries and keys before the rotation.
    if (norm := getattr(context.attention, "q_norm", None)) is not None:
        q = norm(q)
    if (norm := getattr(context.attention, "k_norm", None)) is not None:
        k = norm(k)
    batch, n = keys.shape[:2]
    cos, sin = (t.to(k.device).expand(batch, -1, -1) for t in context.rope)
    rows, real = rows.to(k.device), context.real.to(k.device)
    index = rows[..., None].expand(-1, -1, cos.shape[-1])
    q = rotate(q, cos.gather(1, index), sin.gather(1, index))
    k = rotate(k, cos, sin)
    columns = torch.arange(n, device=k.device)
    seen = columns <= rows[..., None]
    near = columns > rows[..., None] - (n if context.window is None else context.window)
    if context.blocks is not None:
        blocks = context.blocks.to(k.device)
        own = blocks.gather(1, rows)[..., None]
        together = (blocks[:, None] == own) & (own >= 0)
        seen = (seen | together) & near if context.window_cuts_blocks else (seen & near) | together
    else:
        seen &= near
    allowed = real[:, None, :] & seen
    if context.past_keys is not None:
        past = context.past_keys.shape[2]
        k = torch.cat([context.past_keys.to(k.device), k], 2)
        past_real = real.new_ones(batch, past) if context.past_real is None else context.past_real.to(k.device)
        allowed = torch.cat([past_real[:, None].expand(-1, rows.shape[1], -1), allowed], 2)
    scale = getattr(context.attention, "scaling", context.head_dim**-0.5)
    cap = getattr(context.attention, "attn_logit_softcapping", None)
    return attention_rows(q, k, scale=scale, mask=allowed[:, None], softcap=cap)[..., -n:]
