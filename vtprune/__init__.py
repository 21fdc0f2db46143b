# SPDX-License-Identifier: Apache-2.0
"""vtprune makes vision-language models faster by pruning or merging visual tokens.

with vtprune.prune(model, "mmtok", keep_tokens=64) as session:
    output = model.generate(**inputs)
print(session.report)
"""

from vtprune.adapters import Adapter, adapter_for, register_adapter
from vtprune.errors import (
    BudgetError,
    ConfigError,
    NothingPrunedError,
    UnsupportedModelError,
    UnsupportedStageError,
    VTPruneError,
)
from vtprune.methods import (
    AIM,
    BeforeLLM,
    Composite,
    DivPrune,
    FastV,
    HoliTom,
    InLLM,
    Method,
    MMTok,
    Pool,
    Progressive,
    Random,
    Scorer,
    TransPrune,
    Uniform,
    UniformFrames,
    VTCCls,
    Zero,
    build_method,
    list_methods,
    register_method,
)
from vtprune.report import Report
from vtprune.session import Session, patch, prune
from vtprune.tokens import Grid, Medium, ModelShape, Selection, VisualTokens

__version__ = "0.1.0"

__all__ = [
    "AIM",
    "Adapter",
    "BeforeLLM",
    "Composite",
    "BudgetError",
    "ConfigError",
    "DivPrune",
    "FastV",
    "HoliTom",
    "Grid",
    "Medium",
    "InLLM",
    "MMTok",
    "Method",
    "ModelShape",
    "NothingPrunedError",
    "Pool",
    "Progressive",
    "Random",
    "Report",
    "Scorer",
    "Selection",
    "Session",
    "TransPrune",
    "Uniform",
    "UniformFrames",
    "UnsupportedModelError",
    "UnsupportedStageError",
    "VTCCls",
    "VTPruneError",
    "VisualTokens",
    "Zero",
    "adapter_for",
    "build_method",
    "list_methods",
    "patch",
    "prune",
    "register_adapter",
    "register_method",
]
