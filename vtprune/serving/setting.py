# SPDX-License-Identifier: Apache-2.0
"""What a server's operator and a request ask for. Nothing here knows a server."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vtprune.adapters import Adapter
from vtprune.errors import BudgetError, ConfigError, UnsupportedStageError
from vtprune.methods import build_method
from vtprune.methods.base import BeforeLLM
from vtprune.serving.signals import check_readable
from vtprune.stages.reading import check_family, check_signals

KEY = "vtprune"
"""Name of the setting: of a server in the overrides of a model's config, of a request in the processor's arguments."""
_CAP = "max_keep_ratio"

Spec = Mapping[str, Any]
"""A method: its name and its fields, keys in alphabetical order, so that equal ones have equal hashes."""

UNSET = object()
"""Stands for a request that says nothing."""


@dataclass(frozen=True)
class ServerSetting:
    """What the operator of a server has set."""

    default: Spec | None
    """The method of requests that name none; None: they are not pruned."""
    max_keep_ratio: float = 1.0
    """The largest share of an image's or video's tokens that a request may keep, in (0, 1]."""

    @classmethod
    def of(cls, value: Any) -> ServerSetting:
        """From a method's name, or a mapping with `name`, its fields and `max_keep_ratio`; None for nothing.

        Raises ConfigError.
        """
        if value is None:
            return cls(None)
        if not isinstance(value, Mapping) or _CAP not in value:
            return cls(spec_of(value))
        rest = dict(value)
        cap = rest.pop(_CAP)
        if isinstance(cap, bool) or not isinstance(cap, int | float) or not 0 < cap <= 1:
            raise ConfigError(f"{_CAP}={cap!r}: expected a number in (0, 1]")
        if not rest and cap < 1:
            raise ConfigError(f"{_CAP}={cap} needs a method: requests that name none would keep everything")
        return cls(spec_of(rest) if rest else None, float(cap))

    def asked(self, value: Any) -> Spec | None:
        """The method of a request that asks for `value`: UNSET for nothing said, None for no pruning.

        Raises ConfigError.
        """
        if value is UNSET:
            return self.default
        if isinstance(value, Mapping) and _CAP in value:
            raise ConfigError(f"{_CAP} is for the operator of the server; a request sets keep_ratio or keep_tokens")
        spec = None if value is None else spec_of(value)
        if spec is None and self.max_keep_ratio < 1:
            raise BudgetError(f"this server keeps at most {self.max_keep_ratio:.0%} of the visual tokens")
        return spec


def spec_of(value: Any) -> Spec:
    """A method's name, or a mapping with `name` and fields, with a stable order. Raises ConfigError."""
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise ConfigError(f"{KEY}: expected a method's name or a mapping with 'name', got {value!r}")
    return {key: given[key] for key in sorted(given)}


def method_of(spec: Spec, adapter: Adapter) -> BeforeLLM:
    """The method of a setting, for a model. Raises VTPruneError if it cannot act in a server."""
    try:
        written = json.dumps(spec, sort_keys=True)
    except TypeError as error:
        raise ConfigError(f"{KEY}: {error}") from None
    return _method(written, adapter)


@functools.lru_cache(maxsize=256)
def _method(written: str, adapter: Adapter) -> BeforeLLM:
    method = build_method(json.loads(written))
    method.check_budget(adapter.shape)
    parts = method.parts(adapter.shape)
    others = sorted({part.stage for part in parts if not isinstance(part, BeforeLLM)})
    if others:
        raise UnsupportedStageError(
            f"{method.name} acts at the stage {', '.join(others)}; a server has one length for all layers and a cache "
            "for all requests, so only methods before the LLM can act in it: mmtok, divprune, visionzip"
        )
    if len(parts) != 1:
        raise UnsupportedStageError(f"{method.name} consists of several methods; a server takes one")
    (part,) = parts
    assert isinstance(part, BeforeLLM)
    if part.keep_ratio is None and part.keep_tokens is None:
        raise BudgetError(
            f"{method.name} has no budget, and a server counts the tokens before it sees the image: "
            "give keep_ratio=0.25 or keep_tokens=64, for example"
        )
    if part.positions == "original":
        raise UnsupportedStageError("positions='original' is not built for servers; positions='compact' works")
    check_signals(part, adapter.shape)
    check_family(part, adapter)
    check_readable(part, adapter)
    return part
