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
    LTP,
    AdaptivePool,
    BeforeLLM,
    BVLLMMerge,
    Composite,
    DivPrune,
    FastV,
    GLSim,
    HoliTom,
    InLLM,
    Method,
    MMTok,
    Pool,
    Progressive,
    ProgressivePooling,
    Random,
    Recoverable,
    Scorer,
    TextMonkey,
    TokenCorrelation,
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
    "AdaptivePool",
    "BVLLMMerge",
    "BeforeLLM",
    "BudgetError",
    "Composite",
    "ConfigError",
    "DivPrune",
    "FastV",
    "GLSim",
    "Grid",
    "HoliTom",
    "InLLM",
    "LTP",
    "MMTok",
    "Medium",
    "Method",
    "ModelShape",
    "NothingPrunedError",
    "Pool",
    "Progressive",
    "ProgressivePooling",
    "Random",
    "Recoverable",
    "Report",
    "Scorer",
    "Selection",
    "Session",
    "TextMonkey",
    "TokenCorrelation",
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
