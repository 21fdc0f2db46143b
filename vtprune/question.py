# SPDX-License-Identifier: Apache-2.0
"""The question that text-guided methods are guided by: given to the session, or read from the prompt's own tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.adapters.base import Adapter
from vtprune.errors import ConfigError
from vtprune.layout import Groups
from vtprune.ops.keywords import keywords
from vtprune.signals import TextEmbeddings
from vtprune.stages.call import Call

Text = str | list[str] | Tensor | list[Tensor]
"""A question: text or token ids (m,), one for all samples or a list with one a sample."""


def embed_question(text: Text | None, call: Call, groups: Groups, request: TextEmbeddings) -> list[Tensor]:
    """Input embeddings (text tokens, dim) of each group's question.

    Raises ConfigError if the number of questions is not that of the samples, or a string cannot be tokenized.
    """
    if text is None:
        return _from_prompt(call, groups)
    texts = list(text) if isinstance(text, (list, tuple)) else [text]
    copies = call.media.copies
    if len(texts) not in (1, call.batch // copies):
        raise ConfigError(f"text: got {len(texts)} questions for {call.batch // copies} samples")
    embed, device = call.adapter.base.get_input_embeddings(), call.embeddings.device
    rows = [embed(_token_ids(call.adapter, item, request.keywords).to(device)) for item in texts]
    return [rows[row // copies if len(rows) > 1 else 0] for row in groups.rows.tolist()]


def _from_prompt(call: Call, groups: Groups) -> list[Tensor]:
    """The text after the last visual token of each group's image, or all text of its sample if none follows."""
    text = call.real & ~call.media.visual
    special = (*_special_ids(call.adapter), *call.adapter.marker_token_ids)
    if call.ids is not None and special:
        text = text & ~torch.isin(call.ids, torch.tensor(special, device=call.ids.device)).to(text.device)
    columns = torch.arange(call.length, device=text.device)
    questions = []
    for row, image in zip(groups.rows.tolist(), groups.images.tolist(), strict=True):
        end = columns[call.media.images[row] == image].max()
        after = text[row] & (columns > end)
        chosen = after if bool(after.any()) else text[row]
        questions.append(call.embeddings[row][chosen.to(call.embeddings.device)])
    return questions


def _token_ids(adapter: Adapter, text: str | Tensor, only_keywords: bool) -> Tensor:
    if not isinstance(text, str):
        return torch.as_tensor(text, dtype=torch.long)
    from transformers import AutoTokenizer  # slow to import, rarely needed

    path = adapter.model.name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise ConfigError(
            f"text is a string, but no tokenizer could be loaded from the model's checkpoint {path!r} ({error}); "
            "pass token ids instead"
        ) from error
    words = keywords(text).split() if only_keywords else None
    ids = tokenizer(words or text, is_split_into_words=bool(words), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _special_ids(adapter: Adapter) -> tuple[int, ...]:
    """Ids of bos, eos and padding."""
    found = []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(adapter.text_config, name, None)
        found.extend(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(found)
