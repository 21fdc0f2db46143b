# SPDX-License-Identifier: Apache-2.0
"""What becomes of every multimodal class of the installed transformers: an adapter, or a reason."""

from __future__ import annotations

from typing import NamedTuple

from vtprune.adapters import Adapter, list_adapters
from vtprune.adapters.refusals import REFUSALS, Refusal
from vtprune.transformers_private import multimodal_classes


class Coverage(NamedTuple):
    """What becomes of one model type; "type/tower" where families share a class."""

    model_type: str
    class_name: str
    adapter: type[Adapter] | None
    refusal: Refusal | None
    """None if there is an adapter."""


def coverage() -> list[Coverage]:
    """Every model type that transformers loads with a multimodal class, sorted; those of other packages left out."""
    adapters, rows = list_adapters(), []
    for model_type, class_name in sorted(multimodal_classes().items()):
        names = sorted(name for name in adapters if name.partition("/")[0] == model_type)
        rows += [Coverage(name, class_name, adapters[name], None) for name in names]
        if not names:
            rows.append(Coverage(model_type, class_name, None, REFUSALS.get(model_type)))
    return rows


def families() -> list[tuple[type[Adapter], list[str]]]:
    """Every adapter with the model types that it is for, sorted by the families' names."""
    types: dict[type[Adapter], list[str]] = {}
    for model_type, adapter in list_adapters().items():
        types.setdefault(adapter, []).append(model_type)
    return sorted(types.items(), key=lambda item: item[0].family.casefold())
