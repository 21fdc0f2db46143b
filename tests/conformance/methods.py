# SPDX-License-Identifier: Apache-2.0
"""The methods that every promise is checked for, with budgets that fit models of 6 to 8 layers."""

from __future__ import annotations

from typing import Any

import pytest

SPECS: dict[str, list[dict[str, Any]]] = {
    "vtc_cls": [{"name": "vtc_cls", "keep_ratio": 0.3}],
    "divprune": [{"name": "divprune", "keep_ratio": 0.3}],
    "mmtok": [{"name": "mmtok", "keep_tokens": 5}],
    "random": [{"name": "random", "keep_ratio": 0.4, "seed": 3}],
    "uniform": [{"name": "uniform", "keep_ratio": 0.25}],
    "pool": [{"name": "pool", "keep_ratio": 0.25}],
    "zero": [{"name": "zero"}],
    "fastv": [{"name": "fastv", "layer": 2, "keep_ratio": 0.5}],
    "transprune-ttv": [
        {"name": "transprune", "score": "ttv", "layers": (2, 3, 5), "schedule": (0.8, 0.5, 0.2)},
    ],
    "transprune-iga": [
        {"name": "transprune", "score": "iga", "layers": (1, 3, 4), "schedule": (0.8, 0.5, 0.2)},
    ],
    "transprune-both": [{"name": "transprune", "score": "both", "keep_ratio": 0.5}],
    "vtc_cls+fastv": [
        {"name": "vtc_cls", "keep_ratio": 0.6},
        {"name": "fastv", "layer": 3, "keep_ratio": 0.7},
    ],
    "divprune+transprune": [
        {"name": "divprune", "keep_ratio": 0.7},
        {"name": "transprune", "layers": (2, 3, 5), "schedule": (0.8, 0.5, 0.2)},
    ],
}

# Merging methods average features, so their recompute averages too.
MERGING = {"pool"}
# What they choose depends on the image alone, not on the prompt.
IMAGE_ONLY = ["vtc_cls", "divprune", "uniform", "pool", "zero"]
IN_LLM = ["fastv", "transprune-ttv", "transprune-iga", "transprune-both"]


def spec(name: str, **fields) -> list[dict[str, Any]]:
    """The method (list) under a name of `SPECS`, with fields such as `positions` set for all its parts."""
    return [part | fields for part in SPECS[name]]


def needs_cls(name: str) -> bool:
    return "vtc_cls" in name


def supported(model_name: str, name: str) -> bool:
    return not (needs_cls(name) and model_name == "siglip")


def on_every_model(*names: str):
    """Parametrises `model_name` and `name` over all models and the given specs (default: all of them)."""
    pairs = [(m, n) for m in ("mha", "gqa", "siglip") for n in names or SPECS if supported(m, n)]
    return pytest.mark.parametrize(("model_name", "name"), pairs, ids=["-".join(pair) for pair in pairs])


def keep_everything(name: str) -> list[dict[str, Any]]:
    """The methods under a name, asked to keep everything."""
    budgets = ("keep_ratio", "keep_tokens", "schedule")
    return [{k: v for k, v in part.items() if k not in budgets} | {"keep_ratio": 1.0} for part in SPECS[name]]
