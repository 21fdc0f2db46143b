# SPDX-License-Identifier: Apache-2.0
"""What `vtprune.prune(model, "auto", ...)` takes: a method for each family, with the reason. There is no more to it.

A session has one method for whatever a prompt shows, so families with videos have a method that is good for images and
for videos. The reasons are measurements of this project (docs/results.md) and of the methods' authors. None of them is
of your data: `vtprune tune` measures there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from vtprune.adapters import adapter_for, find_encoder
from vtprune.errors import ConfigError
from vtprune.methods import AUTO, MethodLike, build_method
from vtprune.methods.base import Method


@dataclass(frozen=True)
class Default:
    """A method with its parameters, and why it is the default."""

    spec: dict[str, Any]
    why: str


_COVERAGE = Default(
    {"name": "mmtok"},
    "coverage of question and image; the highest accuracy at 25 % and 11 % of the tokens in the image results of "
    "docs/results.md, and published for this family",
)
_COVERAGE_OF_A_VIDEO = Default(
    {"name": "mmtok", "scope": "image"},
    "coverage of question and image or whole video; first or second of the methods at every budget of the video "
    "results in docs/results.md, and the highest accuracy at 25 % and 11 % in the image results",
)
_DIVERSITY = Default(
    {"name": "divprune"},
    "diversity of the features; it needs no text, no attention and no CLS token, so it fits every family, and it is "
    "close to the best in the image results of docs/results.md",
)
DEFAULTS = {
    "LLaVA-1.5": _COVERAGE,
    "LLaVA-NeXT": _COVERAGE,
    "LLaVA-NeXT-Video": _COVERAGE_OF_A_VIDEO,
    "LLaVA-OneVision": _COVERAGE_OF_A_VIDEO,
    "Video-LLaVA": _COVERAGE_OF_A_VIDEO,
    "Qwen2.5-VL": Default({**_COVERAGE_OF_A_VIDEO.spec, "tau_text": 0.01}, _COVERAGE_OF_A_VIDEO.why),
}
"""Family -> its default. All other families have `GENERAL`."""

GENERAL = _DIVERSITY


def is_auto(method: MethodLike) -> bool:
    """Whether a method is left to the library: "auto", or a mapping with that name."""
    name = method.get("name") if isinstance(method, Mapping) else method
    return isinstance(name, str) and name == AUTO


def default_for(model: nn.Module) -> Default:
    """The default of a model's family.

    Raises:
        UnsupportedModelError: there is no adapter for the family.
        ConfigError: the model is a vision encoder alone, for which there is no default.
    """
    if find_encoder(model) is not None:
        raise ConfigError(
            f"{AUTO!r} is for vision-language models, and this is a vision encoder alone: name a method, such as tome"
        )
    return DEFAULTS.get(adapter_for(model).family, GENERAL)


def choose(model: nn.Module, method: MethodLike, **parameters: Any) -> tuple[Method, str]:
    """The method for a model, and the line that says so in the report.

    Args:
        model: as `vtprune.prune` takes it.
        method: for which `is_auto` holds; the other keys of a mapping are parameters.
        parameters: of the method; they replace those of the default.

    Raises:
        UnsupportedModelError, ConfigError, BudgetError: as `vtprune.prune` does.
    """
    default = default_for(model)
    given = {key: value for key, value in method.items() if key != "name"} if isinstance(method, Mapping) else {}
    chosen = build_method({**default.spec, **given}, **parameters)
    return chosen, f"auto chose {chosen.name}: {default.why}"
