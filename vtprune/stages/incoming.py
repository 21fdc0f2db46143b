# SPDX-License-Identifier: Apache-2.0
"""What a model is called with: noted before it computes anything, and read when its language model begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtprune.adapters.base import PIXELS, Adapter
from vtprune.devices import CPU, read, send
from vtprune.errors import ConfigError, UnsupportedStageError, VTPruneError
from vtprune.stages.cache import Owner
from vtprune.stages.call import Call
from vtprune.stages.encoder import COMPUTED_ELSEWHERE, EncoderRecorder
from vtprune.stages.media import Media
from vtprune.transformers_private import (
    Cache,
    DynamicCache,
    ask_for_all_rows,
    cache_of,
    check_arguments,
    is_checkpointed,
    last_rows_only,
    releases,
    with_cache,
)


def check_traced() -> None:
    """Raise UnsupportedStageError while a call is recorded: the choices made now would become constants."""
    is_exporting = getattr(torch.compiler, "is_exporting", torch.jit.is_tracing)  # from torch 2.7 on
    if torch.jit.is_tracing() or is_exporting():
        raise UnsupportedStageError(
            "a model cannot be traced or exported while a vtprune session is on it: what is chosen for these inputs "
            "would be kept for all others; end the session first"
        )


@dataclass(frozen=True)
class Behind:
    """What tells where the prompts of a call end, and an answer or guesses begin."""

    prompt_length: Any = None
    """Tokens of each prompt, padding not counted: an int, or one a sample; None if nobody said so."""
    labels: Tensor | None = None
    """(batch, length) long, -100 for what is not learnt."""
    logits_to_keep: int | Tensor = 0
    """For how many of the last columns logits are asked for (the prompt's last and all behind it), or for which."""

    @classmethod
    def of(cls, kwargs: dict[str, Any], prompt_length: Any) -> Behind:
        """From the arguments of the outer model's forward."""
        return cls(prompt_length, kwargs.get("labels"), kwargs.get("logits_to_keep", 0))

    def prompt(self, real: Tensor) -> Tensor:
        """What of the columns `real` (batch, length) bool is of the prompt, same shape.

        Raises ConfigError for a `prompt_length` that does not fit.
        """
        columns = torch.arange(real.shape[1])
        if self.prompt_length is not None:
            lengths = torch.as_tensor(self.prompt_length, device=CPU).reshape(-1, 1)
            if len(lengths) not in (1, len(real)) or bool((lengths < 1).any()):
                raise ConfigError(
                    f"prompt_length={self.prompt_length!r}: give a positive number of tokens, or one for each of the "
                    f"{len(real)} samples"
                )
            return real & (real.cumsum(1) <= lengths)
        if self.labels is not None:
            learnt = (self.labels != -100).cpu() & real
            first = torch.where(learnt, columns, real.shape[1]).amin(1, keepdim=True)
            # Labels from the very first token on say nothing of where the prompt ends.
            begin = torch.where(real, columns, real.shape[1]).amin(1, keepdim=True)
            return real & ((columns < first) | (first <= begin + 1))
        asked = self.logits_to_keep
        if torch.is_tensor(asked):
            # Only the last columns, all of them, say where a prompt ends.
            last = columns[real.shape[1] - asked.numel() :] if asked.numel() <= real.shape[1] else columns
            asked = asked.numel() if torch.equal(asked.to(last) % real.shape[1], last) else 1
        return real & (columns <= real.shape[1] - max(asked, 1))


@dataclass(frozen=True)
class Incoming:
    """What the outer model was called with, noted before it calls the language model."""

    ids: Tensor | None
    """On the CPU if media came with them."""
    embeddings: Tensor | None
    mask: Any
    """The attention mask; some models build their layers' masks from it before they call the language model. On the CPU
    if media came with it, and it is one of columns."""
    blocks: Tensor | None
    """See `Adapter.blocks`."""
    pixels: tuple[str, ...]
    """Kinds of media that come as pixels."""
    encoded: dict[str, Any]
    """Kind -> encoded features that came ready-made, as `generate()` passes them."""
    cache: Cache | None
    """The KV cache that the outer model was called with."""
    behind: Behind
    placed: dict[str, Tensor | None]
    """Kind -> see `Adapter.prompt_tokens`."""
    packed: bool
    """Whether the rows of the call may hold several samples, one after another."""

    @classmethod
    def of(cls, adapter: Adapter, args: tuple, kwargs: dict[str, Any], behind: Behind) -> Incoming:
        """From the arguments of the base model's forward, and what the model around it was told."""
        given = kwargs.get("mm_encoder_outputs") or {}
        encoded = {kind: given[kind] for kind in PIXELS if given.get(kind) is not None}
        pixels = tuple(kind for kind in PIXELS if adapter.pixel_argument(kind, kwargs) is not None)
        ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
        if encoded or pixels:
            ids, mask = _read_columns(ids, mask)
        return cls(
            ids=ids,
            embeddings=kwargs.get("inputs_embeds"),
            mask=mask,
            blocks=adapter.blocks(kwargs) if encoded or pixels else None,
            pixels=pixels,
            encoded=encoded,
            cache=cache_of(kwargs),
            behind=behind,
            placed={kind: adapter.prompt_tokens(kind, kwargs) for kind in (*pixels, *encoded)},
            packed=_is_packed(kwargs),
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        return (*self.pixels, *self.encoded)

    def check_text_only(self, adapter: Adapter) -> None:
        """Raise UnsupportedStageError if a call without media has placeholders of visual tokens in its prompt."""
        if self.ids is None:
            return
        placeholders = torch.tensor(list(adapter.visual_token_ids.values()), device=self.ids.device)
        if count := int(torch.isin(self.ids, placeholders).sum()):
            raise UnsupportedStageError(
                f"the prompt holds {count} placeholders of visual tokens, but neither pixels nor features came with it "
                "(up to transformers 5.20, chunked prefill drops them); pass whole prompts with their images"
            )

    def check_packed(self) -> None:
        """Raise UnsupportedStageError if samples are packed: they would see one another once tokens are gone."""
        if self.packed:
            raise UnsupportedStageError(
                "packed samples (position ids that start again, or cu_seq_lens) cannot be pruned; pass one sample a "
                "row with a 2D padding mask"
            )

    def check_cache(self, cache: Cache | None) -> None:
        """Raise VTPruneError unless the language model is called with the KV cache that the outer model has."""
        if self.cache is not None and cache is None:
            raise VTPruneError(f"a KV cache is in use, but the language model was called without it: {releases()}")


def _read_columns(ids: Tensor | None, mask: Any) -> tuple[Tensor | None, Any]:
    """Both on the CPU, with one wait for the device, which is short before the vision encoder runs.

    A mask that is not of columns stays where it is.
    """
    of_columns = torch.is_tensor(mask) and mask.ndim == 2
    if ids is None or not of_columns:
        return None if ids is None else ids.cpu(), mask.cpu() if of_columns else mask
    ids, flags = read(ids, mask != 0)
    return ids, flags


def _is_packed(kwargs: dict[str, Any]) -> bool:
    """Whether a model would take each row of a call for several samples, by its arguments."""
    if any(name.startswith("cu_seq_lens") and value is not None for name, value in kwargs.items()):
        return True
    positions = kwargs.get("position_ids")
    if positions is None or kwargs.get("attention_mask") is not None or positions.ndim == 3 and len(positions) == 3:
        return False
    # Of four rows the first is the text's; the others are the axes of M-RoPE.
    steps = (positions[0] if positions.ndim == 3 else positions).diff()
    # Without a cache models take gaps, too, for the start of another sample.
    return bool((steps != 1).any()) if cache_of(kwargs) is None else bool((steps < 1).any())


@dataclass(frozen=True)
class Columns:
    """The columns of a call of the language model."""

    past: int
    """Logical length of the cache."""
    real: Tensor
    """(batch, length) bool, on the CPU."""
    positions: Tensor
    """(..., batch | 1, length): position ids."""
    past_real: Tensor | None
    """(batch, past) bool, on the CPU; None if there is no padding in the cache, or it is not looked for."""

    @classmethod
    def of(cls, hidden: Tensor, kwargs: dict[str, Any], mask: Any, *, has_images: bool) -> Columns:
        """From the embeddings (batch, length, dim) and arguments of the language model and the attention mask that the
        outer model was called with. Raises UnsupportedStageError for a mask that is not of columns."""
        batch, length = hidden.shape[:2]
        cache = cache_of(kwargs)
        past = int(cache.get_seq_length()) if cache is not None else 0
        check_of_columns(mask)
        real = torch.ones(batch, length, dtype=torch.bool)
        past_real = None
        if mask is not None and (has_images or length > 1):  # a single decoded token is never padding
            mask = (mask != 0).cpu()
            real = mask[:, -length:]
            if past and not bool(mask[:, :past].all()):
                past_real = mask[:, :past]
        return cls(past, real, positions_of(hidden, kwargs, lambda: past), past_real)


def check_of_columns(mask: Any) -> None:
    """Raise UnsupportedStageError for an attention mask that is not of columns."""
    if mask is not None and not (torch.is_tensor(mask) and mask.ndim == 2):
        raise UnsupportedStageError(
            "visual tokens cannot be pruned under a ready-made 4D attention mask (static caches, packed sequences, "
            "chunked prefill); pass a 2D padding mask"
        )


def positions_of(hidden: Tensor, kwargs: dict[str, Any], past: Callable[[], int]) -> Tensor:
    """(..., batch | 1, length): position ids of embeddings (batch, length, dim) behind a cache.

    past: tells the length of the cache. It is only asked where no position ids are given, since to ask takes time.
    """
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = past() + torch.arange(hidden.shape[1], device=hidden.device)[None]
    return positions


def open_call(
    adapter: Adapter,
    owner: Owner,
    recorder: EncoderRecorder,
    hidden: Tensor,
    kwargs: dict,
    mask: Any,
    incoming: Incoming,
) -> Call:
    """The state of a call that carries images.

    hidden (batch, length, dim), kwargs: embeddings and arguments of the language model, which are given a cache if they
    lack one that is to be used, and lose an empty one that no layer will fill.
    """
    decoder, use_cache, cache = adapter.language_model, kwargs.get("use_cache"), cache_of(kwargs)
    if is_checkpointed(adapter.decoder_layers[0]):
        if cache is not None and not cache.get_seq_length():
            kwargs.update(with_cache(decoder, kwargs, None))
    elif cache is None and (adapter.text_config.use_cache if use_cache is None else use_cache):
        kwargs.update(with_cache(decoder, kwargs, DynamicCache(config=decoder.config)))
    columns = Columns.of(hidden, kwargs, mask, has_images=True)
    check_arguments(type(decoder).__name__, kwargs, *hidden.shape[:2])
    media = _media_in_prompt(adapter, recorder, incoming, hidden, columns.real)
    last_rows = last_rows_only(kwargs)
    # They stay the last ones if they are one token of text in each sample.
    if last_rows and not (last_rows == 1 and columns.real[:, -1].all() and not media.visual[:, -1].any()):
        ask_for_all_rows(kwargs)
        last_rows = 0
    return Call(
        adapter=adapter,
        owner=owner,
        batch=hidden.shape[0],
        length=hidden.shape[1],
        past=columns.past,
        prompt=incoming.behind.prompt(columns.real),
        cache=cache_of(kwargs),
        real=columns.real,
        positions=columns.positions,
        media=media,
        blocks=incoming.blocks,
        masks_by_type=isinstance(kwargs.get("attention_mask"), dict),
        deepstack={},
        ids=incoming.ids,
        embeddings=hidden,
        past_real=columns.past_real,
        last_rows=last_rows,
    )


def _media_in_prompt(
    adapter: Adapter, recorder: EncoderRecorder, incoming: Incoming, hidden: Tensor, real: Tensor
) -> Media:
    """Where the media of a call stand in it. Raises UnsupportedStageError if that cannot be told."""
    # In the order in which transformers knows kinds: what is encoded is numbered in this order, too.
    kinds = [kind for kind in adapter.visual_token_ids if kind in incoming.kinds]
    visual = [_columns_of(adapter, incoming, kind) & real for kind in kinds]
    encodings = [recorder.encoding(kind, incoming.encoded.get(kind), incoming.placed.get(kind)) for kind in kinds]
    if adapter.images_joined:
        for columns, encoding in zip(visual, encodings, strict=True):
            encoding.part(columns.sum(1))
    media = Media.find(visual, encodings, adapter.tiles_adjoin)
    if any(incoming.encoded.get(e.kind, e.output) is not e.output for e in encodings) and not media.holds(hidden):
        raise UnsupportedStageError(f"the visual tokens cannot be told apart: {COMPUTED_ELSEWHERE}")
    return media


def _columns_of(adapter: Adapter, incoming: Incoming, kind: str) -> Tensor:
    """(batch, length) bool: columns that hold features of a kind."""
    placeholder = adapter.visual_token_ids[kind]
    if incoming.ids is not None:
        return incoming.ids == placeholder
    # The caller gave embeddings: transformers, too, then finds the places by the placeholder's embedding.
    embeddings = incoming.embeddings
    embedding = adapter.base.get_input_embeddings()(send(torch.tensor(placeholder), embeddings.device))
    return (embeddings == embedding.to(embeddings.device)).all(-1).cpu()
