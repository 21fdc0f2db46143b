# SPDX-License-Identifier: Apache-2.0
"""Methods: one file each. `list_methods()` names them, `build_method()` makes one from a name, a mapping or a file."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtprune.errors import BudgetError, ConfigError
from vtprune.methods.adaptive_pool import AdaptivePool
from vtprune.methods.aim import AIM
from vtprune.methods.base import (
    AfterPrefill,
    BeforeLLM,
    Composite,
    InEncoder,
    InLLM,
    Method,
    Progressive,
    Reviving,
    Scorer,
)
from vtprune.methods.bvllm_merge import BVLLMMerge
from vtprune.methods.cdpruner import CDPruner
from vtprune.methods.dart import DART
from vtprune.methods.divprune import DivPrune
from vtprune.methods.fastervlm import FasterVLM
from vtprune.methods.fastv import FastV
from vtprune.methods.fastvid import FastVID
from vtprune.methods.glsim import GLSim
from vtprune.methods.holitom import HoliTom
from vtprune.methods.lazyllm import LazyLLM
from vtprune.methods.ltp import LTP
from vtprune.methods.mmtok import MMTok
from vtprune.methods.mustdrop import MustDrop
from vtprune.methods.pdrop import PyramidDrop
from vtprune.methods.pool import Pool
from vtprune.methods.progressive_pooling import ProgressivePooling
from vtprune.methods.random import Random
from vtprune.methods.recoverable import Recoverable
from vtprune.methods.sparsevlm import SparseVLM
from vtprune.methods.textmonkey import TextMonkey
from vtprune.methods.token_correlation import TokenCorrelation
from vtprune.methods.transprune import TransPrune
from vtprune.methods.uniform import Uniform
from vtprune.methods.uniform_frames import UniformFrames
from vtprune.methods.vidcom2 import VidCom2
from vtprune.methods.visionzip import VisionZip
from vtprune.methods.vispruner import VisPruner
from vtprune.methods.vtc_cls import VTCCls
from vtprune.methods.zero import Zero
from vtprune.plugins import load_plugins

__all__ = [
    "AIM",
    "AdaptivePool",
    "AfterPrefill",
    "BVLLMMerge",
    "BeforeLLM",
    "CDPruner",
    "Composite",
    "DART",
    "DivPrune",
    "FastV",
    "FastVID",
    "FasterVLM",
    "GLSim",
    "HoliTom",
    "InEncoder",
    "InLLM",
    "LTP",
    "LazyLLM",
    "MMTok",
    "Method",
    "MustDrop",
    "Pool",
    "Progressive",
    "ProgressivePooling",
    "PyramidDrop",
    "Random",
    "Recoverable",
    "Reviving",
    "Scorer",
    "SparseVLM",
    "TextMonkey",
    "TokenCorrelation",
    "TransPrune",
    "Uniform",
    "UniformFrames",
    "VTCCls",
    "VidCom2",
    "VisPruner",
    "VisionZip",
    "Zero",
    "build_method",
    "build_methods",
    "list_methods",
    "register_method",
]

_METHODS: dict[str, type[Method]] = {}

MethodLike = Method | str | Path | Mapping[str, Any] | Sequence[Any]
"""What names a method: an object, a registered name, a mapping with `name`, a list of those, or a YAML file."""


def register_method(method: type[Method]) -> type[Method]:
    """Make a method known under its `name`; usable as a decorator. Raises ConfigError if the name is taken."""
    if _METHODS.get(method.name, method) is not method:
        raise ConfigError(f"a method named {method.name!r} is registered already")
    _METHODS[method.name] = method
    return method


for _method in (
    VTCCls,
    FasterVLM,
    VisPruner,
    TransPrune,
    MMTok,
    CDPruner,
    DivPrune,
    FastV,
    DART,
    HoliTom,
    VidCom2,
    FastVID,
    AIM,
    MustDrop,
    LTP,
    LazyLLM,
    PyramidDrop,
    SparseVLM,
    TextMonkey,
    ProgressivePooling,
    AdaptivePool,
    BVLLMMerge,
    TokenCorrelation,
    Recoverable,
    GLSim,
    VisionZip,
    Random,
    Uniform,
    UniformFrames,
    Pool,
    Zero,
):
    register_method(_method)


@functools.cache
def _load_entry_points() -> None:
    load_plugins("vtprune.methods", register_method)


def list_methods() -> dict[str, type[Method]]:
    """Name -> class of every method, third-party ones included."""
    _load_entry_points()
    return dict(_METHODS)


def build_method(spec: Method | str | Mapping[str, Any], **parameters: Any) -> Method:
    """One method from an object, a name, or a mapping with `name` and parameters; `parameters` override its fields.

    Raises ConfigError (unknown name or parameter, with the nearest known ones) or BudgetError.
    """
    from vtprune.config import nearest  # brings pydantic, which is slow to import

    if isinstance(spec, Method):
        given: dict[str, Any] = {}
        name = spec.name
        cls, fields = type(spec), {f.name for f in dataclasses.fields(spec)}
    else:
        given = {"name": spec} if isinstance(spec, str) else dict(spec)
        name = given.pop("name", None)
        known = list_methods()
        if name not in known:
            raise ConfigError(f"unknown method {name!r}: {nearest(str(name), known)}")
        cls, fields = known[name], {f.name for f in dataclasses.fields(known[name])}
    for key in (*given, *parameters):
        if key not in fields:
            raise ConfigError(f"{name}: unknown parameter {key!r}: {nearest(key, fields)}")
    if isinstance(spec, Method):
        return dataclasses.replace(spec, **parameters)
    return cls(**given | parameters)


def build_methods(spec: MethodLike, **parameters: Any) -> list[Method]:
    """The methods of a specification, in the order of the path: before the LLM, then inside it.

    A string that ends in .yaml or .yml, or a Path, is read as a file. `parameters` are for a single method only.
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
        raise ConfigError(f"expected a method, its name, a mapping with 'name' or a list of those, got {spec!r}")
    if parameters:
        raise ConfigError(f"{', '.join(parameters)}: give each method of a list its own budget and parameters")
    methods = [build_method(item) for item in spec]
    return sorted(methods, key=lambda method: method.stage != "before_llm")
