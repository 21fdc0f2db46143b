# SPDX-License-Identifier: Apache-2.0
"""Steps of decoding on a static cache, compiled in the session: one graph for all of them, hooks included."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import vtprune
from vtprune.testing import families
from vtprune.transformers_private import CACHE

from .test_static_cache import static

STEPS = 4
CASES = [("llava", "divprune"), ("llava", "transprune"), ("gemma3", "fastv")]


@pytest.fixture(autouse=True)
def empty_caches():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def decode(model, step, inputs) -> torch.Tensor:
    """(STEPS + 1, batch, vocabulary): greedy, with a prefill that nothing compiles."""
    cache = static(model, inputs["input_ids"].shape[1] + STEPS)
    logits = [model(**inputs, **{CACHE: cache}, use_cache=True).logits[:, -1]]
    for _ in range(STEPS):
        ids = logits[-1].argmax(-1, keepdim=True)
        logits.append(step(input_ids=ids, **{CACHE: cache}, use_cache=True).logits[:, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("name", "method", "backend"),
    [
        *((*case, "eager") for case in CASES),
        *(pytest.param(*case, "inductor", marks=pytest.mark.slow) for case in CASES),
    ],
)
def test_all_steps_are_one_graph(name, method, backend, padded):
    model = families.build(name)
    batch = families.batch(name, model)
    inputs = batch.inputs if padded else batch.singles[0]
    counter = CompileCounterWithBackend(backend)
    with vtprune.prune(model, method, keep_ratio=0.5, positions="compact") as session, torch.no_grad():
        expected = decode(model, model, inputs)
        step = torch.compile(model.forward, fullgraph=True, backend=counter)
        torch.testing.assert_close(decode(model, step, inputs), expected, atol=1e-4, rtol=0)
        assert session.report.keep_ratio < 1
        # The next request of the same session and shape compiles nothing.
        torch.testing.assert_close(decode(model, step, inputs), expected, atol=1e-4, rtol=0)
    assert counter.frame_count == 1 and not counters["graph_break"]
