# SPDX-License-Identifier: Apache-2.0
"""Methods: one file each. `list_methods()` names them, `build_method()` makes one from a name or a mapping."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune import catalogue
from vtprune.errors import BudgetError, ConfigError, shown
from vtprune.methods.base import BeforeLLM, Method
from vtprune.plugins import load_plugins

if TYPE_CHECKING:
    from vtprune.catalogue import *  # noqa: F403 (the methods are also exported from here)
else:

    def __getattr__(name: str) -> type[Method]:
        return catalogue.exported(name, __name__)


_METHODS: dict[str, type[Method]] = {}
"""Those that were registered, and those of the library that were asked for."""

AUTO = "auto"
"""The name that leaves the method to the library (`vtprune.auto`)."""

MethodLike = Method | str | Path | Mapping[str, Any] | Sequence[Any]
"""How to name a method: an object, a registered name, a mapping with `name`, a list of these, or a YAML file."""


def register_method(method: type[Method]) -> type[Method]:
    """Register a method under its `name`; usable as a decorator.

    Raises ConfigError if the name is taken, if the class has no `name` or `signal`, or if it is not a dataclass.
    """
    for attribute in ("name", "signal"):
        if not isinstance(getattr(method, attribute, None), str):
            raise ConfigError(f"{method.__qualname__} has no `{attribute}`: a method states it as a ClassVar[str]")
    parameters = [name for name, kind in inspect.get_annotations(method).items() if "ClassVar" not in str(kind)]
    if parameters and "__dataclass_params__" not in vars(method):
        raise ConfigError(
            f"{method.__qualname__} is not a dataclass, so {', '.join(parameters)} would not be its parameters: put "
            "@dataclass(frozen=True, kw_only=True) on it"
        )
    if method.name == AUTO:
        raise ConfigError(f"{method.__qualname__}: no method may be named {AUTO!r}, which leaves the choice to vtprune")
    if _find_method(method.name) not in (None, method):
        raise ConfigError(f"a method named {method.name!r} is registered already")
    _METHODS[method.name] = method
    return method


def _find_method(name: str) -> type[Method] | None:
    """The class of a method of the library or of a registered one; None if no method has this name."""
    if name not in _METHODS and name in catalogue.CLASSES:
        _METHODS[name] = catalogue.load(name)
    return _METHODS.get(name)


@functools.cache
def _load_entry_points() -> None:
    load_plugins("vtprune.methods", register_method)


def list_methods() -> dict[str, type[Method]]:
    """Name -> class of every method, including those of other packages."""
    _load_entry_points()
    return {name: catalogue.load(name) for name in catalogue.CLASSES} | _METHODS


def build_method(spec: Method | str | Mapping[str, Any], **parameters: Any) -> Method:
    """Make one method from an object, a name, or a mapping with `name` and parameters. `parameters` override fields.

    Raises ConfigError (unknown name or parameter; the message has the nearest known ones) or BudgetError.
    """
    from vtprune.config import nearest  # brings pydantic, which is slow to import

    if isinstance(spec, Method):
        given: dict[str, Any] = {}
        name = spec.name
        cls, fields = type(spec), {f.name for f in dataclasses.fields(spec)}
    else:
        if not isinstance(spec, (str, Mapping)):
            raise ConfigError(f"expected a method, its name or a mapping with 'name', got {shown(spec)}")
        given = {"name": spec} if isinstance(spec, str) else dict(spec)
        name = given.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(f"the name of a method is a string, got {shown(name)} in {shown(spec)}")
        _load_entry_points()
        if name == AUTO:
            raise ConfigError(
                f"{AUTO!r} depends on the model, so it stands only in vtprune.prune(model, {AUTO!r}, ...); here name a "
                "method: `vtprune methods --model MODEL` says which one it would be"
            )
        found = _find_method(name)
        if found is None:
            raise ConfigError(f"unknown method {shown(name)}: {nearest(name, list_methods())}")
        cls, fields = found, {f.name for f in dataclasses.fields(found)}
    for key in (*given, *parameters):
        if key not in fields:
            known = nearest(key if isinstance(key, str) else "", fields)
            raise ConfigError(f"{name}: unknown parameter {shown(key)}: {known}")
    if isinstance(spec, Method):
        return dataclasses.replace(spec, **parameters)
    return cls(**given | parameters)


def build_methods(spec: MethodLike, **parameters: Any) -> list[Method]:
    """Make the methods of a specification. Those before the LLM come first, then those inside it.

    A Path, or a string that ends in .yaml or .yml, is read as a file. `parameters` are allowed for a single method
    only.
    """
    if isinstance(spec, Path) or (isinstance(spec, str) and spec.endswith((".yaml", ".yml"))):
        from vtprune.config import load_method_file

        try:
            return build_methods(load_method_file(spec), **parameters)
        except (ConfigError, BudgetError) as error:
            raise error if str(spec) in str(error) else type(error)(f"{spec}: {error}") from None
    if isinstance(spec, (str, Mapping, Method)):
        return [build_method(spec, **parameters)]
    if not isinstance(spec, Sequence) or not spec:
        raise ConfigError(f"expected a method, its name, a mapping with 'name' or a list of those, got {shown(spec)}")
    if parameters:
        raise ConfigError(f"{', '.join(parameters)}: give each method of a list its own budget and parameters")
    methods = [build_method(item) for item in spec]
    return sorted(methods, key=lambda method: not isinstance(method, BeforeLLM))
