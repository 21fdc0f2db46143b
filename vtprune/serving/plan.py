# SPDX-License-Identifier: Apache-2.0
"""What is to be done with one image or video: decided where a request comes in, carried out where it is encoded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtprune.adapters import Adapter, adapter_for
from vtprune.budget import group_counts
from vtprune.errors import BudgetError, UnsupportedStageError
from vtprune.methods.base import BeforeLLM
from vtprune.serving.setting import Spec
from vtprune.stages.layout import Groups
from vtprune.tokens import Medium


@dataclass(frozen=True)
class Plan:
    """The decision on one image or video."""

    method: Spec
    kept: int
    """Tokens left, separators included; all of them if nothing is to be dropped."""
    total: int
    """Tokens that it has."""
    text: tuple[int, ...] | None = None
    """Ids of the question, for methods guided by it."""
    prompt_key: int = 0
    """A number that depends on the prompt's text, for methods that draw at random."""
    within: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Text between the visual tokens: before which of them it stands, and its ids. Which of them stay is not known
    before they are encoded, so the embeddings of the text take their places among what is left."""

    @property
    def prunes(self) -> bool:
        return self.kept < self.total

    def pack(self) -> Tensor:
        """(bytes,) uint8: what travels between the processes of a server is tensors."""
        return torch.tensor(list(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()), dtype=torch.uint8)

    @classmethod
    def unpack(cls, packed: Tensor) -> Plan:
        values = json.loads(bytes(packed.flatten().tolist()))
        values["text"] = None if values["text"] is None else tuple(values["text"])
        values["within"] = tuple((place, tuple(ids)) for place, ids in values["within"])
        return cls(**values)


def tokens_left(medium: Medium, method: BeforeLLM, max_keep_ratio: float) -> int:
    """How many of a medium's tokens a method keeps, separators included.

    max_keep_ratio: the largest share that may be kept.
    Raises BudgetError for a budget that is larger than that, or than the image, or leaves nothing; and
    UnsupportedStageError if separators go with their lines.
    """
    separators = int((medium.crops < 0).sum())
    if separators and not method.keep_separators:
        raise UnsupportedStageError(
            f"{method.name} would drop newline tokens of lines that lose all content, and which these are is not known "
            "before the image is encoded; set keep_separators=true"
        )
    groups = groups_of(medium, method.scope)
    lengths = groups.valid.sum(1)
    kept = int(torch.minimum(method.budgets(lengths, groups.images), lengths).sum())
    most = int(group_counts(lengths, groups.images, max_keep_ratio, None).sum())
    if kept > most:
        raise BudgetError(
            f"{method.name} would keep {kept} of {int(lengths.sum())} visual tokens; this server keeps at most {most} "
            f"({max_keep_ratio:.0%})"
        )
    left = kept + separators
    if not left:
        raise BudgetError(f"{method.name} leaves no place for the image in the prompt; leave the image out")
    return left


def groups_of(medium: Medium, scope: str) -> Groups:
    """Groups over the tokens of one medium, which are a sequence of their own: one a crop, or one for all ("image").

    Separators are in no group.
    """
    labels, count = medium.crops[None], len(medium.grids)
    if scope == "image":
        labels, count = labels.clamp(max=0), 1
    nothing = torch.zeros(count, dtype=torch.long)
    return Groups.of_labels(labels, nothing, nothing)


def media_of(adapter: Adapter, kind: str, inputs: Mapping[str, Any], tokens: list[int]) -> list[Medium]:
    """The layout of each image or video of a call.

    inputs: the arguments of the server's model, which transformers knows by the same names; `image_num_patches` is how
        many tiles each image is cut into. tokens: how many tokens each has.
    """
    if not adapter.tiles_adjoin:
        return adapter.media(kind, inputs, [torch.empty(count, 1) for count in tokens])
    # transformers knows the tiles of an image as images of their own.
    tiles = torch.as_tensor(inputs[f"{kind}_num_patches"]).flatten().tolist()
    media = []
    for count, parts in zip(tokens, tiles, strict=True):
        layouts = adapter.media(kind, inputs, [torch.empty(count // parts, 1)] * parts)
        media.append(Medium.of_grids(*(layout.grids[0] for layout in layouts)))
    return media


_ADAPTERS: dict[int, tuple[Any, Adapter]] = {}
"""id of a config -> the config, so that it stays alive, and its adapter."""


def adapter_of(config: Any) -> Adapter:
    """The adapter of a checkpoint, by its config alone. Raises UnsupportedModelError."""
    if id(config) not in _ADAPTERS:
        from transformers import AutoModelForImageTextToText

        # Facts come from the config. The modules have no memory, and never run.
        with torch.device("meta"):
            _ADAPTERS[id(config)] = config, adapter_for(AutoModelForImageTextToText.from_config(config))
    return _ADAPTERS[id(config)][1]
