# SPDX-License-Identifier: Apache-2.0
"""vtprune makes vision-language models faster by pruning or merging visual tokens.

with vtprune.prune(model, "mmtok", keep_tokens=64) as session:
    output = model.generate(**inputs)
print(session.report)
"""

from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from vtprune.catalogue import CLASSES as _METHODS

if TYPE_CHECKING:
    from vtprune.adapters import Adapter, Generic, adapter_for, register_adapter
    from vtprune.catalogue import *  # noqa: F403 (the methods; `__all__` below has them, too)
    from vtprune.encoder_report import EncoderReport
    from vtprune.encoder_session import EncoderSession
    from vtprune.errors import (
        BudgetError,
        ConfigError,
        NothingPrunedError,
        UnsupportedModelError,
        UnsupportedStageError,
        VTPruneError,
    )
    from vtprune.methods import build_method, list_methods, register_method
    from vtprune.methods.base import AfterPrefill, BeforeLLM, Composite, InEncoder, InLLM, Method, Scorer
    from vtprune.methods.in_layers import InLayers, LayerTokens
    from vtprune.methods.schedules import CutOnce, Progressive, Reviving, Staged
    from vtprune.report import Report
    from vtprune.session import Session, patch, prune
    from vtprune.tokens import Grid, Medium, Merging, ModelShape, Selection, VisualTokens
    from vtprune.totals import Totals
else:
    _HOMES = {
        "adapters": ("Adapter", "Generic", "adapter_for", "register_adapter"),
        "encoder_report": ("EncoderReport",),
        "encoder_session": ("EncoderSession",),
        "errors": (
            "BudgetError",
            "ConfigError",
            "NothingPrunedError",
            "UnsupportedModelError",
            "UnsupportedStageError",
            "VTPruneError",
        ),
        "methods": ("build_method", "list_methods", "register_method"),
        "methods.base": ("AfterPrefill", "BeforeLLM", "Composite", "InEncoder", "InLLM", "Method", "Scorer"),
        "methods.in_layers": ("InLayers", "LayerTokens"),
        "methods.schedules": ("CutOnce", "Progressive", "Reviving", "Staged"),
        "report": ("Report",),
        "session": ("Session", "patch", "prune"),
        "tokens": ("Grid", "Medium", "Merging", "ModelShape", "Selection", "VisualTokens"),
        "totals": ("Totals",),
    }
    """Module -> what it exports, as above. Nothing is imported before it is asked for: torch takes seconds, and
    `vtprune --help` needs none of it."""

    _MODULES = {name: module for module, names in _HOMES.items() for name in names} | {
        class_name: f"methods.{name}" for name, class_name in _METHODS.items()
    }

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            value = globals()[name] = getattr(import_module(f"vtprune.{_MODULES[name]}"), name)
            return value
        if not name.startswith("_") and find_spec(f"vtprune.{name}") is not None:
            return import_module(f"vtprune.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        special = {name for name in globals() if name.startswith("__")}
        modules = {module.name for module in iter_modules(globals()["__path__"]) if not module.name.startswith("_")}
        return sorted(special | modules | set(__all__))


__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AfterPrefill",
    "BeforeLLM",
    "BudgetError",
    "Composite",
    "ConfigError",
    "CutOnce",
    "EncoderReport",
    "EncoderSession",
    "Generic",
    "Grid",
    "InEncoder",
    "InLLM",
    "InLayers",
    "LayerTokens",
    "Medium",
    "Merging",
    "Method",
    "ModelShape",
    "NothingPrunedError",
    "Progressive",
    "Report",
    "Reviving",
    "Scorer",
    "Selection",
    "Session",
    "Staged",
    "Totals",
    "UnsupportedModelError",
    "UnsupportedStageError",
    "VTPruneError",
    "VisualTokens",
    "adapter_for",
    "build_method",
    "list_methods",
    "patch",
    "prune",
    "register_adapter",
    "register_method",
    *_METHODS.values(),
]
