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
    "vtc_cls": 2,
    "fastervlm": 2,
    "vispruner": 2,
    "transprune": 8,
    "mmtok": 2,
    "cdpruner": 2,
    "divprune": 2,
    "fastv": 4,
    "dart": 4,
    "holitom": 2,
    "vidcom2": 2,
    "fastvid": 2,
    "aim": 6,
    "mustdrop": 29,
    "tome": 4,
    "auroracap": 4,
    "tinychart": 4,
    "mctf": 4,
    "zero_tprune": 4,
    "tca": 4,
    "ltp": 16,
    "lazyllm": 8,
    "pdrop": 8,
    "sparsevlm": 12,
    "textmonkey": 2,
    "progressive_pooling": 2,
    "adaptive_pool": 2,
    "bvllm_merge": 2,
    "token_correlation": 2,
    "recoverable": 2,
    "glsim": 2,
    "glsim_patches": 4,
    "visionzip": 2,
    "scope": 2,
    "holov": 2,
    "prunesid": 5,
    "prumerge": 2,
    "prumerge_plus": 2,
    "flashvid": 2,
    "dtd": 2,
    "dycoke": 2,
    "mmr": 2,
    "random": 3,
    "uniform": 2,
    "random_patches": 7,
    "uniform_patches": 7,
    "uniform_frames": 2,
    "block": 3,
    "pool": 2,
    "zero": 2,
    "divprune + transprune": 8,
    "holitom + transprune": 8,
    "tome + transprune": 10,
}
"""Method -> waits of a prefill of three padded prompts with four images: values that are read, and values that
are sent without `non_blocking=True`, in the vision encoder, before the LLM, inside it, and for the report."""

VIDEO_WAITS = {"divprune": 2, "vidcom2": 2, "fastvid": 3, "holitom": 6, "bvllm_merge": 6, "recoverable": 3}
"""Method -> waits of a prefill of three padded prompts with four videos. FastVID's scenes, and the counts of
Recoverable Compression, which merges here, are read for all videos together; HoliTom reads of each video which
positions are still, and B-VLLM how similar its frames are."""

STEP_WAITS = {"lazyllm": 9}
"""Method -> waits of a step of decoding; none for all others."""


@functools.cache
def model(family: str = "llava") -> Any:
    """A model whose parameters are on the device."""
    return put(families.build(family))


def sites(waits: HostWaits) -> str:
    return "\n".join(f"{n} {' '.join(site)}" for site, n in sorted(waits.sites.items()))


@pytest.mark.parametrize("name", METHODS)
def test_waits_of_a_prefill(name):
    inputs = put(families.batch("llava", model()).inputs)
    with vtprune.prune(model(), METHODS[name]) as session, torch.no_grad():
        with HostWaits() as waits:
            model()(**inputs)
        assert session.report.keep_ratio < 1
    assert waits.total == WAITS[name], sites(waits)


@pytest.mark.parametrize("name", VIDEO_WAITS)
def test_waits_of_a_prefill_with_videos(name):
    videos = model("llava_onevision")
    inputs = put(families.batch("llava_onevision", videos, media="video").inputs)
    spec = METHODS[name] if name != "recoverable" else [{"name": name, "keep_ratio": 0.3}]
    with vtprune.prune(videos, spec), torch.no_grad(), HostWaits() as waits:
        videos(**inputs)
    assert waits.total == VIDEO_WAITS[name], sites(waits)


@pytest.mark.parametrize("name", METHODS)
def test_waits_of_a_decoding_step(name):
    inputs = put(families.batch("llava", model()).singles[0])
    with vtprune.prune(model(), METHODS[name]), torch.no_grad(), HostWaits() as waits:
        output = model()(**inputs, use_cache=True)
        mask = inputs["attention_mask"]
        for _ in range(2):
            mask = torch.cat([mask, mask[:, :1]], 1)
            token = output.logits[:, -1:].argmax(-1)
            waits.sites.clear()
            output = model()(
                input_ids=token, attention_mask=mask, past_key_values=output.past_key_values, use_cache=True
            )
    assert waits.total == STEP_WAITS.get(name, 0), sites(waits)
