# SPDX-License-Identifier: Apache-2.0
"""How often a prefill waits for an accelerator in code of this library, for every method."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from host_waits import HostWaits, put

import vtprune
from vtprune.testing import families

from .methods import METHODS

WAITS = {
    "vtc_cls": 55,
    "fastervlm": 55,
    "vispruner": 71,
    "transprune": 116,
    "mmtok": 84,
    "cdpruner": 69,
    "divprune": 145,
    "fastv": 67,
    "dart": 68,
    "holitom": 101,
    "vidcom2": 100,
    "fastvid": 113,
    "aim": 114,
    "mustdrop": 224,
    "tome": 65,
    "auroracap": 65,
    "tinychart": 65,
    "mctf": 65,
    "zero_tprune": 65,
    "tca": 65,
    "ltp": 198,
    "lazyllm": 119,
    "pdrop": 113,
    "sparsevlm": 117,
    "textmonkey": 55,
    "progressive_pooling": 75,
    "adaptive_pool": 72,
    "bvllm_merge": 102,
    "token_correlation": 59,
    "recoverable": 91,
    "glsim": 55,
    "glsim_patches": 65,
    "visionzip": 61,
    "random": 68,
    "uniform": 57,
    "random_patches": 68,
    "uniform_patches": 68,
    "uniform_frames": 72,
    "block": 76,
    "pool": 72,
    "zero": 51,
    "divprune + transprune": 312,
    "holitom + transprune": 180,
    "tome + transprune": 144,
}
"""Method -> waits at most of a prefill of three padded prompts with four images: values that are read, and values that
are sent without `non_blocking=True`, in the vision encoder, before the LLM, inside it, and for the report."""


@functools.cache
def model() -> Any:
    """A LLaVA whose parameters are on the device."""
    return put(families.build("llava"))


@pytest.mark.parametrize("name", METHODS)
def test_waits_of_a_prefill(name):
    inputs = put(families.batch("llava", model()).inputs)
    with vtprune.prune(model(), METHODS[name]) as session, torch.no_grad():
        with HostWaits() as waits:
            model()(**inputs)
        assert session.report.keep_ratio < 1
    assert waits.total <= WAITS[name], "\n".join(f"{n} {' '.join(site)}" for site, n in sorted(waits.sites.items()))
