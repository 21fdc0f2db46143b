# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: each rank has some of the encoder's heads, and all of them choose alike."""

from __future__ import annotations

import os

import pytest

from .checkpoints import save
from .serving import A, B, Reference, Request, assert_equal, engine, serve

pytestmark = pytest.mark.slow

BLIND = ("divprune", "mmtok")
OF_HEADS = ("visionzip", "vtc_cls", "glsim", "vispruner")
"""They read attention, keys or outputs of the encoder's layers."""


@pytest.mark.parametrize(("name", "methods"), [("llava", BLIND + OF_HEADS), ("qwen2_5_vl", BLIND)])
def test_two_ranks_answer_as_one(name, methods, folder, monkeypatch):
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    path = save(name, folder)
    reference = Reference(path)
    with engine(path, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        for method in methods:
            spec = {"name": method, "keep_ratio": 0.3}
            asked = [Request("look : {image} who is this ?", [A], spec), Request("{image} {image} who ?", [A, B], spec)]
            for request, answer in zip(asked, serve(llm, name, asked), strict=True):
                assert_equal(reference.answer(request), answer)
