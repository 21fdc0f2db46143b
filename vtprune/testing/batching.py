# SPDX-License-Identifier: Apache-2.0
"""A batch of any model from what its processor gave: the padded inputs, and each sample alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtprune.adapters.base import Adapter
from vtprune.errors import ConfigError
from vtprune.testing.families import Batch

TEXT = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Encoded:
    """What one of the model's own encode functions gave for a batch."""

    kind: str
    columns: Tensor
    """(batch, length) bool: those that hold its placeholder."""
    arguments: dict[str, Any]
    """of the call"""
    features: Any
    """`Adapter.features_of` what it returned"""

    @property
    def rows(self) -> Tensor:
        """(tokens of all media, dim)"""
        return torch.cat([part.flatten(0, -2) for part in self.features])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each part of `features`."""
        return [part[..., 0].numel() for part in self.features]


@torch.no_grad()
def encode_all(adapter: Adapter, inputs: Mapping[str, Any], only: str | None = None) -> list[Encoded]:
    """What the model's encode functions give for the pixels of a batch, outside of any session.

    only: the one kind that is encoded.
    """
    found = []
    for kind, placeholder in adapter.visual_token_ids.items():
        if adapter.pixel_argument(kind, inputs) is None or only not in (None, kind):
            continue
        arguments, output = adapter.encode(kind, inputs)
        found.append(Encoded(kind, inputs["input_ids"] == placeholder, arguments, adapter.features_of(output)))
    return found


def joined(singles: Sequence[Mapping[str, Tensor]], padding: int) -> dict[str, Tensor]:
    """Inputs of single prompts as one batch, padded on the left. padding: the id that it is filled up with."""
    longest = max(single["input_ids"].shape[1] for single in singles)
    names = dict.fromkeys(name for single in singles for name in single)
    inputs = {}
    for name in names:
        values = [single[name] for single in singles if name in single]
        if isinstance(values[0], list):  # one entry a medium
            inputs[name] = [entry for own in values for entry in own]
            continue
        if all(_is_text(name, single) for single in singles if name in single):
            fill = padding if name == "input_ids" else 0
            inputs[name] = torch.cat([pad(x, (longest - x.shape[1], 0), value=fill) for x in values])
        else:
            sizes = torch.tensor([x.shape[1:] for x in values]).amax(0).tolist() if values[0].ndim > 1 else []
            if any(_packed_by(name, single) is not None for single in singles):
                inputs[name] = torch.cat(values, -1)
            else:
                inputs[name] = torch.cat([pad(x, _missing(x.shape[1:], sizes)) for x in values])
    return inputs


def split(encoded: Iterable[Encoded], inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The samples of a batch, padded on the left, each alone without padding.

    encoded: see `encode_all`; it says how many images each prompt holds.
    Raises ConfigError if it cannot be told which rows of an argument belong to which sample.
    """
    lists = {name for name, value in inputs.items() if isinstance(value, list)}
    inputs = {name: torch.as_tensor(value) for name, value in inputs.items()}
    count, length = inputs["input_ids"].shape
    starts = (length - inputs["attention_mask"].sum(1)).tolist()
    singles: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, value in inputs.items():
        if _is_text(name, inputs):
            parts = [value[[row], start:] for row, start in enumerate(starts)]
        else:
            of_kind = [e for e in encoded if ("video" in name) == (e.kind == "video")]
            rows = _rows(name, value, of_kind[0], inputs) if of_kind else _unknown(name)
            parts = list(value.split(rows, 0 if _packed_by(name, inputs) is None else -1))
        for single, part in zip(singles, parts, strict=True):
            if part.numel():
                single[name] = part.tolist() if name in lists else part
    return singles


def padded(model: Any, inputs: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The inputs of a batch, which may come as a list of those of its samples. Raises ConfigError if they are none."""
    padding = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    together = dict(inputs) if isinstance(inputs, Mapping) else joined(_masked(inputs), padding) if inputs else {}
    mask = together.get("attention_mask")
    real = mask is not None and "input_ids" in together and len(mask) > 1 and bool(mask[:, -1].all())
    if not real or bool(mask.all()):
        raise ConfigError(
            "give input_ids and attention_mask of two samples or more, of different lengths, padded on the left; or a "
            "list with the inputs of each sample"
        )
    return together


def batch_of(
    adapter: Adapter, inputs: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]], together: dict[str, Tensor]
) -> Batch:
    """The batch of inputs that `padded` made `together`. Raises ConfigError if its samples cannot be told apart."""
    by_themselves = split(encode_all(adapter, together), together) if isinstance(inputs, Mapping) else _masked(inputs)
    return Batch(
        inputs=together,
        singles=by_themselves,
        visual_ids=tuple(adapter.visual_token_ids.values()),
        pads=(together["attention_mask"] == 0).sum(1).tolist(),
        padding_side="left",
    )


def _masked(singles: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{"attention_mask": torch.ones_like(single["input_ids"]), **single} for single in singles]


def _is_text(name: str, inputs: Mapping[str, Tensor]) -> bool:
    """Whether an argument has a column a token."""
    return name in TEXT or (inputs[name].shape == inputs["input_ids"].shape and not inputs[name].is_floating_point())


def _missing(size: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """What `pad` adds behind, last axis first."""
    return [n for have, want in zip(reversed(size), reversed(wanted), strict=True) for n in (0, want - have)]


def _packed_by(name: str, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """(media, 2) rows and columns of patches of media whose pixels stand side by side along the last axis of an
    argument, as MiniCPM-V has them; None if they do not."""
    sizes = name.replace("pixel_values", "target_sizes")
    return None if sizes == name else inputs.get(sizes)


def _rows(name: str, value: Tensor, encoded: Encoded, inputs: Mapping[str, Tensor]) -> list[int]:
    """How many rows of an argument belong to each sample; along its last axis if it is packed."""
    tokens = encoded.columns.sum(1)
    media = media_per_sample(encoded)
    if (sizes := _packed_by(name, inputs)) is not None:
        return [int(own.prod(1).sum()) * value.shape[2] for own in sizes.split(media)]
    if len(value) == sum(media):
        return media
    grid = inputs.get(f"{encoded.kind}_grid_thw", inputs.get(f"{encoded.kind}_grid_hw"))
    if grid is not None and len(value) == int(grid.prod(1).sum()):
        return [int(grids.prod(1).sum()) for grids in grid.split(media)]
    if len(value) == len(tokens):
        return [1] * len(tokens)
    if len(value) == int((tokens > 0).sum()):
        return (tokens > 0).long().tolist()
    return _unknown(name)


def _unknown(name: str) -> list[int]:
    raise ConfigError(
        f"it cannot be told which rows of {name} belong to which sample; give a list with the inputs of each sample"
    )


def media_per_sample(encoded: Encoded) -> list[int]:
    """Parts of the features that each prompt's placeholders hold.

    Raises ConfigError if a prompt ends within one of them.
    """
    ends = torch.tensor(encoded.lengths).cumsum(0).tolist()
    tokens = encoded.columns.sum(1)
    counted = [0]
    for end in tokens.cumsum(0).tolist():
        if end and end not in ends:
            raise ConfigError(
                f"the prompts hold {tokens.tolist()} {encoded.kind} placeholders, and the model's features of its "
                f"{encoded.kind}s are {encoded.lengths} tokens long"
            )
        counted.append(ends.index(end) + 1 if end else 0)
    return [after - before for before, after in zip(counted, counted[1:], strict=False)]
