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
    "vtc_cls": 8,
    "fastervlm": 8,
    "vispruner": 22,
    "transprune": 16,
    "mmtok": 21,
    "cdpruner": 8,
    "divprune": 100,
    "fastv": 8,
    "dart": 7,
    "holitom": 49,
    "vidcom2": 52,
    "fastvid": 61,
    "aim": 22,
    "mustdrop": 42,
    "tome": 7,
    "auroracap": 7,
    "tinychart": 7,
    "mctf": 7,
    "zero_tprune": 7,
    "tca": 7,
    "ltp": 25,
    "lazyllm": 19,
    "pdrop": 16,
    "sparsevlm": 17,
    "textmonkey": 7,
    "progressive_pooling": 25,
    "adaptive_pool": 25,
    "bvllm_merge": 52,
    "token_correlation": 10,
    "recoverable": 26,
    "glsim": 8,
    "glsim_patches": 7,
    "visionzip": 10,
    "random": 12,
    "uniform": 12,
    "random_patches": 10,
    "uniform_patches": 10,
    "uniform_frames": 24,
    "block": 20,
    "pool": 25,
    "zero": 6,
    "divprune + transprune": 200,
    "holitom + transprune": 61,
    "tome + transprune": 19,
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
