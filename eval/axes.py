# SPDX-License-Identifier: Apache-2.0
"""Settings of an evaluation that may have several values, which are compared."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
_DEVICES = r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$"


def _device(value: str) -> str:
    if not re.fullmatch(_DEVICES, value):
        raise ValueError("expected auto, cpu, cuda, cuda:1, mps or xpu")
    return value


Device = Annotated[str, AfterValidator(_device), Field(json_schema_extra={"pattern": _DEVICES})]
Positions = Literal["original", "compact"]

AXES = ("dtype", "attention", "device")
"""Settings whose lists give a study for each value, with a full model of its own."""


def _one_or_several(value: Any) -> Any:
    """A list of one value is that value."""
    if not isinstance(value, list | tuple):
        return value
    if not value or len(set(map(str, value))) < len(value):
        raise ValueError("expected one value, or a list of different ones")
    return value[0] if len(value) == 1 else tuple(value)


def values_of(setting: Any) -> tuple[Any, ...]:
    """The values of a setting that may have several."""
    return setting if isinstance(setting, tuple) else (setting,)


def _count_of_values(value: Any) -> str:
    return "several" if isinstance(value, tuple) else "one"


# The discriminator keeps complaints to those about what is written: a value, or a list.
T = TypeVar("T")
OneOrSeveral = Annotated[
    Annotated[T, Tag("one")] | Annotated[tuple[T, ...], Tag("several")],
    Discriminator(_count_of_values),
    BeforeValidator(_one_or_several),
]
"""A setting, or a list of its values."""
