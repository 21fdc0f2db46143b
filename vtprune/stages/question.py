# SPDX-License-Identifier: Apache-2.0
"""The question that text-guided methods are guided by: given to the session, or read from the prompt's own tokens."""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

from vtprune.adapters.base import Adapter
from vtprune.devices import send
from vtprune.errors import ConfigError
from vtprune.ops.keywords import keywords
from vtprune.stages.call import Call
from vtprune.stages.layout import Groups
from vtprune.stages.text_tower import text_tower

Text = str | list[str] | Tensor | list[Tensor]
"""A question: text or token ids (m,), one for all samples or a list with one a sample."""

_LOADING = threading.RLock()
"""Held while something is loaded or tokenized: a tokenizer serves one thread at a time."""


def text_embeddings(text: Text | None, call: Call, groups: Groups, keywords: bool) -> list[Tensor]:
    """See `vtprune.signals.TextEmbeddings`.

    Raises ConfigError if the number of questions is not that of the samples, or a string cannot be tokenized.
    """
    if text is None:
        chosen = [send(columns.nonzero()[:, 0], call.embeddings.device) for columns in _in_prompt(call, groups)]
        return [call.embeddings[row][columns] for row, columns in zip(groups.rows.tolist(), chosen, strict=True)]
    embed, device = call.adapter.base.get_input_embeddings(), call.embeddings.device
    rows = [embed(send(_token_ids(call.adapter, item, keywords), device)) for item in _items(text, call)]
    return _per_group(rows, call, groups)


def joint_space(text: Text | None, call: Call, groups: Groups, source: str) -> tuple[Tensor, Tensor]:
    """See `vtprune.signals.JointSpace`.

    Raises ConfigError if the number of questions is not that of the samples, or the text tower `source` cannot be
    loaded or belongs to another encoder.
    """
    with _LOADING:
        return _joint_space(text, call, groups, source)


def _joint_space(text: Text | None, call: Call, groups: Groups, source: str) -> tuple[Tensor, Tensor]:
    tower = text_tower(call.adapter.model, source, call.embeddings.device, call.embeddings.dtype)
    width = call.adapter.vision_config.hidden_size
    if tower.projection.shape[1] != width:
        raise ConfigError(
            f"text_tower: {source!r} is of a CLIP whose vision encoder has a width of "
            f"{tower.projection.shape[1]}, this model's encoder has {width}"
        )
    if text is None:
        if call.ids is None:
            raise ConfigError("a text tower reads strings, and the prompt came as embeddings: pass text=")
        chosen = _in_prompt(call, groups)
        ids = [call.ids[row][columns] for row, columns in zip(groups.rows.tolist(), chosen, strict=True)]
        return tower.encode([_string(call.adapter, question) for question in ids]), tower.projection
    rows = tower.encode([_string(call.adapter, item) for item in _items(text, call)])
    return torch.stack(_per_group(list(rows), call, groups)), tower.projection


def _items(text: Text, call: Call) -> list[str | Tensor]:
    texts = list(text) if isinstance(text, (list, tuple)) else [text]
    samples = call.batch // call.media.copies
    if len(texts) not in (1, samples):
        raise ConfigError(f"text: got {len(texts)} questions for {samples} samples")
    return texts


def _per_group(rows: list[Tensor], call: Call, groups: Groups) -> list[Tensor]:
    """What is one a sample, or one for all, as one a group."""
    return [rows[row // call.media.copies if len(rows) > 1 else 0] for row in groups.rows.tolist()]


def _in_prompt(call: Call, groups: Groups) -> Tensor:
    """(groups, length) bool: the text after the last visual token of each group's image, or all text of its sample if
    none follows."""
    text = call.text
    special = special_ids(call.adapter)
    if call.ids is not None and special:
        text = text & ~torch.isin(call.ids, torch.tensor(special))
    columns = torch.arange(call.length)
    questions = []
    for row, image in zip(groups.rows.tolist(), groups.images.tolist(), strict=True):
        end = columns[call.media.images[row] == image].max()
        after = text[row] & (columns > end)
        questions.append(after if bool(after.any()) else text[row])
    return torch.stack(questions)


def _token_ids(adapter: Adapter, text: str | Tensor, only_keywords: bool) -> Tensor:
    if not isinstance(text, str):
        return torch.as_tensor(text, dtype=torch.long)
    words = keywords(text).split() if only_keywords else None
    with _LOADING:
        tokenizer = _tokenizer_of(adapter, "text is a string", "; pass token ids instead")
        ids = tokenizer(words or text, is_split_into_words=bool(words), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _tokenizer_of(adapter: Adapter, need: str, instead: str):
    """The tokenizer in the model's checkpoint. Raises ConfigError that says what needs it and what to do instead."""
    path = adapter.model.name_or_path
    try:
        return _tokenizer(path)
    except Exception as error:
        raise ConfigError(
            f"{need}, but no tokenizer could be loaded from the model's checkpoint {path!r} ({error}){instead}"
        ) from error


def _string(adapter: Adapter, text: str | Tensor) -> str:
    if isinstance(text, str):
        return text
    tokenizer = _tokenizer_of(adapter, "a text tower reads strings", " to make the prompt's tokens one; pass text=")
    return tokenizer.decode(torch.as_tensor(text).tolist(), skip_special_tokens=True).strip()


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str):
    from transformers import AutoTokenizer  # slow to import, rarely needed

    return AutoTokenizer.from_pretrained(path)


def special_ids(adapter: Adapter) -> tuple[int, ...]:
    """Ids of bos, eos and padding."""
    found = []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(adapter.text_config, name, None)
        found.extend(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(found)
