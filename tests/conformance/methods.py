# SPDX-License-Identifier: Apache-2.0
"""The list of methods that every promise is checked for, with budgets that fit models of 6 to 8 layers.

What a test has to know of a method (whether tokens come back, how they are numbered) is asked of its class.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

import vtprune
from vtprune.methods import build_methods
from vtprune.methods.base import AfterPrefill, InLLM, Method
from vtprune.methods.glsim import ClsSimilarity
from vtprune.methods.in_layers import InLayers
from vtprune.methods.schedules import Reviving
from vtprune.signals import ClsAttention, EncoderSignal, LayerSignal
from vtprune.testing.cases import numbering

Spec = list[dict[str, Any]]

BUDGET = {"keep_ratio": 0.3}
SETTINGS: dict[str, dict[str, Any]] = {
    "zero": {},
    # Where merged features are plain means, the recompute can make them from what was merged.
    "holitom": BUDGET | {"centre_weight": None, "inner_share": 1.0},
    "fastvid": BUDGET | {"anchor_weight": None, "anchor_period": 100},
    "aim": {"keep_ratio": 0.4},  # one round of merging
    "adaptive_pool": BUDGET | {"overlap": False},
    "recoverable": BUDGET | {"gather": False},
    **{name: BUDGET | {"merge": False} for name in ("prumerge", "prumerge_plus")},
    "sparsevlm": BUDGET | {"recycle": 0.0},  # what it merges, it merges between layers
    "bvllm_merge": {"keep_ratio": 0.6, "threshold": 1.0},
    # Their first layer to cut is the third of six.
    "pdrop": {"keep_ratio": 0.4},
    "lazyllm": {"keep_ratio": 0.4},
    # What the few layers of tiny encoders can merge or drop of a few patches.
    **{name: {"keep_ratio": 0.6} for name in ("tome", "auroracap", "tinychart", "mctf", "zero_tprune", "tca")},
    **{name: {"keep_ratio": 0.6} for name in ("random_patches", "uniform_patches", "glsim_patches")},
}
"""Methods that are given something else than the budget of all others alone."""

LIBRARY = [name for name, cls in vtprune.list_methods().items() if cls.__module__.startswith("vtprune.methods")]
"""What the library itself brings. A test may have registered more, and packages outside may have."""
METHODS: dict[str, Spec] = {name: [{"name": name} | SETTINGS.get(name, BUDGET)] for name in LIBRARY}
METHODS["divprune + transprune"] = [{"name": "divprune", "keep_ratio": 0.6}, {"name": "transprune", "keep_ratio": 0.5}]
METHODS["holitom + transprune"] = [
    METHODS["holitom"][0] | {"keep_ratio": 0.6},
    {"name": "transprune", "keep_ratio": 0.5},
]
METHODS["tome + transprune"] = [*METHODS["tome"], {"name": "transprune", "keep_ratio": 0.5}]
"""The columns of the matrix."""

_SCHEDULE = {"layers": (2, 3, 5), "schedule": (0.8, 0.5, 0.2)}
VARIANTS: dict[str, Spec] = {
    "transprune-ttv": [{"name": "transprune", "score": "ttv"} | _SCHEDULE],
    "transprune-iga": [{"name": "transprune", "score": "iga"} | _SCHEDULE | {"layers": (1, 3, 4)}],
    "vtc_cls+fastv": [{"name": "vtc_cls", "keep_ratio": 0.6}, {"name": "fastv", "layer": 3, "keep_ratio": 0.7}],
}
"""Scores and compositions that promises 1 to 8 are checked for on LLaVA, besides."""

_ALL = METHODS | VARIANTS
_SHAPE = vtprune.ModelShape(encoder_layers=6, decoder_layers=6, feature_layer=4, has_cls=True)


def spec(name: str, **fields: Any) -> Spec:
    """The method (list) under a name, with fields such as `positions` set for all its parts.

    `positions` is left out of what has no choice.
    """
    if revives(name):
        fields.pop("positions", None)
    return [part | fields for part in _ALL[name]]


def keep_everything(name: str) -> Spec:
    """The method (list) under a name, asked to keep everything."""
    budgets = ("keep_ratio", "keep_tokens", "schedule")
    return [{k: v for k, v in part.items() if k not in budgets} | {"keep_ratio": 1.0} for part in _ALL[name]]


# -- what the classes say ----------------------------------------------------------------------------------------------


def parts(methods: Spec) -> list[Method]:
    """The parts of one stage each that a method (list) consists of."""
    return [part for method in build_methods(methods) for part in method.parts(_SHAPE)]


def revives(name: str) -> bool:
    """Whether tokens come back while decoding; positions are the original ones then."""
    return any(isinstance(part, Reviving) for part in parts(_ALL[name]))


def evicts(name: str) -> bool:
    """Whether the KV cache loses more tokens when the prefill is over."""
    return any(isinstance(part, AfterPrefill) for part in parts(_ALL[name]))


def acts(name: str, stage: type[Method]) -> bool:
    """Whether a part of it derives from the class of a stage."""
    return any(isinstance(part, stage) for part in parts(_ALL[name]))


def last_cut(name: str, shape: vtprune.ModelShape) -> int:
    """The last decoder layer on whose input it drops something on a model of a shape; 0 for none."""
    inside = [part for method in build_methods(_ALL[name]) for part in method.parts(shape) if isinstance(part, InLLM)]
    return max((cut for part in inside for cut in part.cuts(shape)), default=0)


def drops_patches(name: str) -> bool:
    """Whether it drops patches inside the encoder's layers."""
    return any(isinstance(part, InLayers) and part.drops for part in parts(_ALL[name]))


def needs_cls(name: str) -> bool:
    """Whether it reads what only a CLS token gives."""
    for part in parts(_ALL[name]):
        if isinstance(part, InLayers):
            try:
                part.check_budget(replace(_SHAPE, has_cls=False))
            except vtprune.UnsupportedStageError:
                return True
    signals = [signal for part in parts(_ALL[name]) for signal in part.signals(_SHAPE)]
    return any(isinstance(signal, ClsAttention | ClsSimilarity) for signal in signals)


def needs_grid(name: str) -> bool:
    """Whether it goes by the rows and columns of tokens."""
    return any(part.needs_grid for part in parts(_ALL[name]))


def reads_encoder(name: str, *, layers: bool, features: bool, has_cls: bool) -> bool:
    """Whether it reads what the encoder's layers compute, or what the projector reads."""
    shape = replace(_SHAPE, has_cls=has_cls)
    signals = [signal for part in parts(_ALL[name]) for signal in part.signals(shape)]
    taps = [signal.taps(shape) for signal in signals if isinstance(signal, EncoderSignal)]
    of_layers = any(tap.cls_rows or tap.received or tap.keys or tap.outputs for tap in taps)
    return (layers and of_layers) or (features and any(tap.projector_input for tap in taps))


def attends_in_llm(name: str) -> bool:
    """Whether it reads the attention of a decoder layer."""
    inside = [part for part in parts(_ALL[name]) if isinstance(part, InLLM)]
    signals = [signal for part in inside for signal in part.signals(_SHAPE) if isinstance(signal, LayerSignal)]
    return any(signal.ahead or signal.attends(1) for signal in signals)


def looks_ahead(name: str) -> bool:
    """Whether it reads the attention of the decoder layer that runs next."""
    signals = [signal for part in parts(_ALL[name]) for signal in part.signals(_SHAPE)]
    return any(isinstance(signal, LayerSignal) and signal.ahead for signal in signals)


def numbered(methods: Spec) -> str:
    """`positions` of a recompute of what these methods leave."""
    return numbering(parts(methods))


EVERY = {name: methods for name, methods in _ALL.items() if not acts(name, InLayers)}
"""What promises 1 to 8 are checked for on LLaVA. Methods inside encoder layers are left to the matrix and to
`tests/encoders`, which have the encoder written out: elsewhere features are those of the unpruned encoder."""


# -- parameters of tests -----------------------------------------------------------------------------------------------

SHARE = 3
"""One of so many methods is in the default run of a test, another one for each test; all of them are in `.ci/run`."""


def _marked(test: Callable, index: int, *values: str):
    later = (zlib.crc32(test.__name__.encode()) + index) % SHARE != 0
    return pytest.param(*values, marks=[pytest.mark.slow] if later else [], id="-".join(values))


def every_method(*, names: Iterable[str] = EVERY, without: Callable[[str], bool] = lambda name: False):
    """Parametrises `name` over all methods, but for those that a test says nothing about."""

    def decorate(test):
        names_of_test = [name for name in names if not without(name)]
        return pytest.mark.parametrize("name", [_marked(test, *pair) for pair in enumerate(names_of_test)])(test)

    return decorate


def every_method_and_model(*, without: Callable[[str], bool] = lambda name: False):
    """Parametrises `model_name` and `name` over all models of `models` and all methods that they take."""

    def decorate(test):
        cells = [
            _marked(test, column + row, model_name, name)
            for row, model_name in enumerate(("mha", "gqa", "siglip"))
            for column, name in enumerate(EVERY)
            if not without(name) and not (needs_cls(name) and model_name == "siglip")
        ]
        return pytest.mark.parametrize(("model_name", "name"), cells)(test)

    return decorate
