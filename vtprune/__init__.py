# SPDX-License-Identifier: Apache-2.0
"""vtprune makes vision-language models faster by pruning or merging visual tokens.

with vtprune.prune(model, "mmtok", keep_tokens=64) as session:
    output = model.generate(**inputs)
print(session.report)
"""

from typing import TYPE_CHECKING

from vtprune.adapters import Adapter, Generic, adapter_for, register_adapter
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
from vtprune.methods import catalogue as _catalogue
from vtprune.methods.base import AfterPrefill, BeforeLLM, Composite, InEncoder, InLLM, Method, Scorer
from vtprune.methods.in_layers import InLayers, LayerTokens
from vtprune.methods.schedules import CutOnce, Progressive, Reviving, Staged
from vtprune.report import Report
from vtprune.session import Session, patch, prune
from vtprune.tokens import Grid, Medium, Merging, ModelShape, Selection, VisualTokens
from vtprune.totals import Totals

if TYPE_CHECKING:
    from vtprune.methods.catalogue import *  # noqa: F403 (the methods; `__all__` below has them, too)
else:

    def __getattr__(name: str) -> type[Method]:
        return _catalogue.exported(name, __name__)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


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
    *_catalogue.CLASSES.values(),
]
