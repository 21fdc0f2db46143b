# SPDX-License-Identifier: Apache-2.0
"""What a method may ask the model for: requests, and the cheap way each is answered inside the LLM.

A method announces its requests in `Method.signals()` and looks them up as `tokens[request]`. Attention is never taken
from an eager layer: just the rows asked for are recomputed from queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vtprune.layout import take_columns
from vtprune.ops.attention import attention_received, attention_rows
from vtprune.ops.page_rank import attention_page_rank
from vtprune.transformers_private import Scored, output_width, scored


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
    all its text tokens if none follow), without bos, eos, padding and what a processor puts around media.
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
class Places:
    """The positions of the columns of a decoder layer."""

    ids: Tensor
    """(batch, n) long: position ids of the text; with M-RoPE those of one axis."""
    rope: Any
    """What the language model makes of all axes for its layers: usually cos and sin, (batch | 1, n, rotary dim)."""

    def take(self, index: Tensor) -> Places:
        """Those of the columns `index` (batch, m)."""
        return Places(take_columns(self.ids.expand(len(index), -1), index), _take_rope(self.rope, index))

    def to(self, device: torch.device) -> Places:
        return Places(self.ids.to(device), _map_rope(lambda t: t.to(device), self.rope))


def _map_rope(function: Callable[[Tensor], Tensor], rope: Any) -> Any:
    return function(rope) if torch.is_tensor(rope) else tuple(function(part) for part in rope)


def _take_rope(rope: Any, index: Tensor) -> Any:
    return _map_rope(lambda t: take_columns(t.expand(len(index), -1, -1), index), rope)


@dataclass(frozen=True)
class RowContext:
    """Everything that attention rows of one decoder layer need beside its projections."""

    attention: nn.Module
    places: Places
    """Of the current columns, n of them."""
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
    counting: Tensor | None = None
    """(batch, n) bool: the columns whose rows count where all are asked for, i.e. those of the prompt; None: all."""

    def counted(self, columns: Tensor) -> Tensor:
        """Those of some columns (batch, n) bool that count."""
        return columns if self.counting is None else columns & self.counting.to(columns.device)

    def scored(self, queries: Tensor | None, keys: Tensor | None, rows: Tensor | None = None) -> Scored:
        """Projected queries and keys of all columns, or of the columns `rows` (batch, r), as the layer scores them."""
        places = self.places if rows is None else self.places.take(rows)
        places = places.to((keys if queries is None else queries).device)
        return scored(self.attention, queries, keys, places.rope, places.ids)

    def all_keys(self, keys: Tensor) -> Tensor:
        """(batch, kv heads, n, head dim) -> (batch, kv heads, past + n, head dim)."""
        return keys if self.past_keys is None else torch.cat([self.past_keys.to(keys.device), keys], 2)


def decoder_attention_rows(queries: Tensor, keys: Tensor, rows: Tensor, context: RowContext) -> Tensor:
    """Attention of chosen query rows over the current columns of one decoder layer.

    queries: (batch, r, heads * head_dim), outputs of `q_proj` for the rows; keys: (batch, n, kv heads * head_dim),
    outputs of `k_proj` for all columns; rows: (batch, r) long, the rows' columns. Returns (batch, heads, r, n) float32;
    mass on cached keys and on sinks counts in the softmax and is then left out.
    """
    q, k = context.scored(queries, None, rows), context.scored(None, keys)
    mask = _visible(rows.to(keys.device), context)
    weights = attention_rows(q.queries, context.all_keys(k.keys), mask=mask[:, None], **_bounds(q))
    return weights[..., -keys.shape[1] :]


def decoder_key_norms(keys: Tensor, context: RowContext) -> Tensor:
    """L1 norm of the key of every current column of one decoder layer, all heads together, (batch, n) float32.

    keys: as in `decoder_attention_rows`. Its position turns a key, which changes this norm.
    """
    return context.scored(None, keys).keys.float().abs().sum((1, 3))


def rotary_logits(rows: Tensor, context: RowContext) -> Tensor:
    """(batch, r, n) float32: logits of queries and keys that are all ones but for their positions.

    rows: (batch, r) long, the queries' columns.
    """
    attention, places = context.attention, context.places
    shape, device = (len(rows), places.ids.shape[1]), places.ids.device
    queries, keys = (
        torch.ones(*shape, output_width(attention, projection), device=device) for projection in ("q_proj", "k_proj")
    )
    rope = _map_rope(lambda t: t if t.is_complex() else t.float(), places.rope)
    turned = scored(attention, queries, keys, rope, places.ids, norms=False)
    index = rows.to(device)[..., None].expand(-1, -1, turned.queries.shape[-1])
    return turned.queries[:, 0].gather(1, index) @ turned.keys[:, 0].mT * turned.queries.shape[-1] ** -0.5


def cached_attention_row(
    queries: Tensor, keys: Tensor, visible: Tensor, attention: nn.Module, places: Places
) -> Tensor:
    """Attention of one query a sample over the keys in a cache, (batch, heads, n) float32.

    queries: (batch, 1, heads * head dim), output of `q_proj`; keys: (batch, kv heads, n, head dim), as cached; visible:
    (batch, n) bool; places: of the queries.
    """
    places = places.to(queries.device)
    q = scored(attention, queries, None, places.rope, places.ids)
    return attention_rows(q.queries, keys, mask=visible[:, None, None], **_bounds(q))[:, :, 0]


def decoder_page_rank(queries: Tensor, keys: Tensor, request: AttentionPageRank, context: RowContext) -> Tensor:
    """Ranks of all current columns of one decoder layer, (batch, n) float32; see `decoder_attention_rows`.

    queries, keys: outputs of `q_proj` and `k_proj` for all columns.
    """
    both, columns = context.scored(queries, keys), _columns(keys)
    return attention_page_rank(
        both.queries,
        context.all_keys(both.keys),
        mask=lambda first, last: _visible(columns[:, first:last], context)[:, None],
        valid=context.counted((context.real if context.present is None else context.present).to(keys.device)),
        temperature=request.temperature,
        iterations=request.iterations,
        damping=request.damping,
        **_bounds(both),
    )


def decoder_attention_share(queries: Tensor, keys: Tensor, context: RowContext) -> Tensor:
    """Attention that each current column of one decoder layer receives from all of them, (batch, n) float32.

    queries, keys: as in `decoder_page_rank`. As a multiple of the average, i.e. of one over the number of real columns.
    """
    both, columns = context.scored(queries, keys), _columns(keys)
    real = context.counted(context.real.to(keys.device))
    received = attention_received(
        both.queries,
        context.all_keys(both.keys),
        mask=lambda first, last: _visible(columns[:, first:last], context)[:, None],
        valid=real,
        **_bounds(both),
    )
    return received[:, -keys.shape[1] :] * real.sum(1, keepdim=True)


def _columns(keys: Tensor) -> Tensor:
    """(batch, n) long: the numbers of the columns of keys (batch, n, width)."""
    return torch.arange(keys.shape[1], device=keys.device).expand(len(keys), -1)


def _bounds(scores: Scored) -> dict[str, Any]:
    """How a layer scales and bounds its scores, as `vtprune.ops.attention` takes it."""
    return {"scale": scores.scale, "softcap": scores.softcap, "sinks": scores.sinks}


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
