# SPDX-License-Identifier: Apache-2.0
"""What a method may ask the model for: requests, and the cheap way each is answered inside the LLM.

A method announces its requests in `Method.signals()` and looks them up as `tokens[request]`. Attention is never taken
from an eager layer: just the rows asked for are recomputed from queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from vtprune.ops.attention import attention_received, attention_rows, rotate
from vtprune.ops.page_rank import attention_page_rank


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
class EncoderKeys:
    """(groups, tokens, heads * head dim): key of each visual token in an encoder layer, all heads side by side.

    For encoders without a CLS token, too. Where several patches become one visual token: their mean.
    """

    layer: int
    """0-based encoder layer."""


@dataclass(frozen=True)
class ClsSimilarity:
    """(groups, tokens): similarity of each visual token to the CLS token in the encoder layer that the projector reads.

    Where several patches become one visual token: their mean similarity.
    """

    metric: Literal["cosine", "l1", "l2"] = "cosine"
    """See `vtprune.ops.similarity`."""


@dataclass(frozen=True)
class TextEmbeddings:
    """A list with one (text tokens, dim) tensor a group: input embeddings of the question.

    From the session's `text` if given; otherwise of the prompt's text tokens after the group's last visual token (of
    all its text tokens if none follow), without bos, eos and padding.
    """

    keywords: bool = False
    """Drop stop words from `text` when it is a string, and look its words up one by one."""


@dataclass(frozen=True)
class EncoderOutput:
    """(groups, tokens, dim): what an encoder layer puts out for each visual token, before any last normalisation.

    For encoders without a CLS token, too. Where several patches become one visual token: their mean.
    """

    layer: int
    """0-based encoder layer."""
    normalised: bool = False
    """After CLIP's last normalisation, whatever the layer; other encoders are refused."""


@dataclass(frozen=True)
class JointSpace:
    """A pair: (groups, dim), the question by the text tower of the CLIP that is the model's vision encoder, and
    (dim, width), the matrix that takes an `EncoderOutput` to the same space.

    The question is the session's `text`, or the prompt's text as in `TextEmbeddings`, decoded.
    """

    tower: str
    """Folder or hub id of a transformers CLIP; or "open_clip:NAME@WEIGHTS" with the name of a model that open_clip
    knows, and a file or a tag."""


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

    last_only: bool = False
    """Instead, the row of the prompt's last token alone."""


@dataclass(frozen=True)
class TextAttention:
    """(groups, tokens, 2): attention of the text after the last visual token over the visual tokens, averaged over
    heads, in the decoder layer before the cut: summed over that text, and that of the text token that looks most."""


@dataclass(frozen=True)
class RaterAttention:
    """(groups, heads, tokens): attention of those tokens of the text after the last visual token that the image
    resembles most (`vtprune.ops.raters`) over the visual tokens, averaged over them, in the decoder layer before the
    cut."""

    undo_rotation: bool = False
    """Each weight divided by `rotary_logits` first."""


@dataclass(frozen=True)
class NormedStates:
    """A pair, (groups, tokens, dim) and (groups, text tokens, dim): what enters the next decoder layer, put through the
    LLM's last normalisation; of the visual tokens, and of the text after the last of them."""


@dataclass(frozen=True)
class KeyNorms:
    """A pair, (groups, tokens) and (groups, text tokens) float32: L1 norms of the keys, positions applied, in the
    decoder layer before the cut; of the visual tokens, and of the text after the last of them, -1 for padding."""


@dataclass(frozen=True)
class KeyTokens:
    """(groups, tokens) bool inside the LLM: visual tokens that were, as they entered the LLM, among those of their crop
    that the encoder's CLS query attends to most (`vtprune.ops.dual_attention.key_tokens`)."""

    layer: int
    """0-based encoder layer."""
    share: float
    """Of the tokens of each crop, rounded up."""


@dataclass(frozen=True)
class AttentionPageRank:
    """(groups, tokens): ranks of the visual tokens by `vtprune.ops.page_rank` over the attention of the decoder layer
    before the cut, in which all tokens of the prompt take part; those that are masked have a rank to pass on."""

    temperature: float
    iterations: int
    damping: float


@dataclass(frozen=True)
class AttentionShare:
    """(groups, tokens): attention that each visual token receives in the decoder layer before the cut, from all tokens
    of the prompt and over all heads, as a multiple of what a token receives on average."""

    of_padded: bool = False
    """Instead, the sum over what is left of the prompt divided by the columns that came in, padding included."""


@dataclass(frozen=True)
class Transition:
    """(groups, tokens): token transition variation, attention and MLP sub-blocks, summed over decoder layers.

    TransPrune, arXiv 2507.20630. A later cut sees the sum since the first of these layers.
    """

    layers: tuple[int, ...]
    """0-based decoder layers to measure."""


@dataclass(frozen=True)
class AliveInLastLayer:
    """(groups, tokens) bool, after prefill: which visual tokens of a layer got as far as the last one."""


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
    present: Tensor | None = None
    """(batch, n) bool: `real`, and columns that no row sees although they have rows of their own; None: `real`."""


def decoder_attention_rows(queries: Tensor, keys: Tensor, rows: Tensor, context: RowContext) -> Tensor:
    """Attention of chosen query rows over the current columns of one decoder layer.

    queries: (batch, r, heads * head_dim), outputs of `q_proj` for the rows; keys: (batch, n, kv heads * head_dim),
    outputs of `k_proj` for all columns; rows: (batch, r) long, the rows' columns. Returns (batch, heads, r, n) float32;
    mass on cached keys counts in the softmax and is then left out.
    """
    q, k = _rotated(queries, keys, rows, context)
    mask = _visible(rows.to(k.device), context)
    return attention_rows(q, k, mask=mask[:, None], **_scores(context.attention, context.head_dim))[
        ..., -keys.shape[1] :
    ]


def decoder_key_norms(keys: Tensor, context: RowContext) -> Tensor:
    """L1 norm of the key of every current column of one decoder layer, all heads together, (batch, n) float32.

    keys: as in `decoder_attention_rows`. Its position turns a key, which changes this norm.
    """
    return _rotated_keys(keys, context).float().abs().sum((1, 3))


def rotary_logits(rows: Tensor, context: RowContext) -> Tensor:
    """(batch, r, n) float32: logits of queries and keys that are all ones but for their positions.

    rows: (batch, r) long, the queries' columns.
    """
    cos, sin = context.rope
    ones = cos.new_ones(len(rows), 1, cos.shape[-2], context.head_dim, dtype=torch.float32)
    turned = rotate(ones, cos.float(), sin.float())[:, 0]
    index = rows.to(turned.device)[..., None].expand(-1, -1, context.head_dim)
    return turned.gather(1, index) @ turned.mT * context.head_dim**-0.5


def cached_attention_row(
    queries: Tensor, keys: Tensor, visible: Tensor, attention: nn.Module, rope: tuple[Tensor, Tensor]
) -> Tensor:
    """Attention of one query a sample over the keys in a cache, (batch, heads, n) float32.

    queries: (batch, 1, heads * head dim), output of `q_proj`; keys: (batch, kv heads, n, head dim), as cached; visible:
    (batch, n) bool; rope: cos and sin of the query, (batch, 1, rotary dim).
    """
    head_dim = keys.shape[-1]
    q = rearrange(queries, "b r (h d) -> b h r d", d=head_dim)
    if (norm := getattr(attention, "q_norm", None)) is not None:
        q = norm(q)
    q = rotate(q, *(t.to(q.device) for t in rope))
    return attention_rows(q, keys, mask=visible[:, None, None], **_scores(attention, head_dim))[:, :, 0]


def decoder_page_rank(queries: Tensor, keys: Tensor, request: AttentionPageRank, context: RowContext) -> Tensor:
    """Ranks of all current columns of one decoder layer, (batch, n) float32; see `decoder_attention_rows`.

    queries, keys: outputs of `q_proj` and `k_proj` for all columns.
    """
    batch, n = keys.shape[:2]
    columns = torch.arange(n, device=keys.device).expand(batch, -1)
    q, k = _rotated(queries, keys, columns, context)
    return attention_page_rank(
        q,
        k,
        mask=lambda first, last: _visible(columns[:, first:last], context)[:, None],
        valid=(context.real if context.present is None else context.present).to(k.device),
        temperature=request.temperature,
        iterations=request.iterations,
        damping=request.damping,
        **_scores(context.attention, context.head_dim),
    )


def decoder_attention_share(queries: Tensor, keys: Tensor, context: RowContext) -> Tensor:
    """Attention that each current column of one decoder layer receives from all of them, (batch, n) float32.

    queries, keys: as in `decoder_page_rank`. As a multiple of the average, i.e. of one over the number of real columns.
    """
    batch, n = keys.shape[:2]
    columns = torch.arange(n, device=keys.device).expand(batch, -1)
    q, k = _rotated(queries, keys, columns, context)
    real = context.real.to(k.device)
    received = attention_received(
        q,
        k,
        mask=lambda first, last: _visible(columns[:, first:last], context)[:, None],
        valid=real,
        **_scores(context.attention, context.head_dim),
    )
    return received[:, -n:] * real.sum(1, keepdim=True)


def _scores(attention: nn.Module, head_dim: int) -> dict[str, Any]:
    """How a layer scales and bounds its scores."""
    return {
        "scale": getattr(attention, "scaling", head_dim**-0.5),
        "softcap": getattr(attention, "attn_logit_softcapping", None),
    }


def _rotated(queries: Tensor, keys: Tensor, rows: Tensor, context: RowContext) -> tuple[Tensor, Tensor]:
    """(batch, heads, r, head_dim) queries and (batch, kv heads, past + n, head_dim) keys with their positions."""
    q = rearrange(queries, "b r (h d) -> b h r d", d=context.head_dim)
    # Some families normalise each head's queries and keys before the rotation.
    if (norm := getattr(context.attention, "q_norm", None)) is not None:
        q = norm(q)
    cos, sin = (t.to(q.device).expand(len(q), -1, -1) for t in context.rope)
    index = rows.to(q.device)[..., None].expand(-1, -1, cos.shape[-1])
    q = rotate(q, cos.gather(1, index), sin.gather(1, index))
    k = _rotated_keys(keys, context)
    return q, k if context.past_keys is None else torch.cat([context.past_keys.to(k.device), k], 2)


def _rotated_keys(keys: Tensor, context: RowContext) -> Tensor:
    """(batch, n, kv heads * head_dim) -> (batch, kv heads, n, head_dim), with their positions."""
    k = rearrange(keys, "b n (h d) -> b h n d", d=context.head_dim)
    if (norm := getattr(context.attention, "k_norm", None)) is not None:
        k = norm(k)
    cos, sin = (t.to(k.device).expand(len(k), -1, -1) for t in context.rope)
    return rotate(k, cos, sin)


def _visible(rows: Tensor, context: RowContext) -> Tensor:
    """(batch, r) columns -> (batch, r, past + n) bool: which keys they attend to."""
    real = context.real.to(rows.device)
    batch, n = real.shape
    columns = torch.arange(n, device=rows.device)
    seen = columns <= rows[..., None]
    near = columns > rows[..., None] - (n if context.window is None else context.window)
    if context.blocks is not None:
        blocks = context.blocks.to(rows.device)
        own = blocks.gather(1, rows)[..., None]
        together = (blocks[:, None] == own) & (own >= 0)
        seen = (seen | together) & near if context.window_cuts_blocks else (seen & near) | together
    else:
        seen &= near
    allowed = real[:, None, :] & seen
    if context.past_keys is None:
        return allowed
    past = context.past_keys.shape[2]
    past_real = real.new_ones(batch, past) if context.past_real is None else context.past_real.to(rows.device)
    return torch.cat([past_real[:, None].expand(-1, rows.shape[1], -1), allowed], 2)
