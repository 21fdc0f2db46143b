# SPDX-License-Identifier: Apache-2.0
"""Right where memory is short: requests are preempted, and begin again."""

from __future__ import annotations

import pytest

from .checkpoints import save
from .serving import A, B, C, D, Reference, Request, assert_equal, engine, serve

METHODS = [{"name": name, "keep_ratio": ratio} for name in ("divprune", "mmtok") for ratio in (0.25, 0.5)]
LONG = " ".join(["what is in this picture ? who are you ?"] * 4)


def requests(count: int) -> list[Request]:
    """Prompts of many lengths, each a word longer than the one before."""
    images = (A, B, C, D)
    return [
        Request(f"look : {{image}} {LONG}" + " who" * number, [images[number % 4]], (*METHODS, None)[number % 5])
        for number in range(count)
    ]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_preempted_requests_are_answered_as_alone(name, folder):
    path = save(name, folder)
    reference = Reference(path)
    asked = requests(24)
    # Eleven blocks hold two or three of the prompts, and one that needs one more takes it from another.
    options = dict(num_gpu_blocks_override=11, max_model_len=256, disable_log_stats=False, enable_prefix_caching=False)
    with engine(path, **options) as llm:
        answers = serve(llm, name, asked)
        (preempted,) = (found.value for found in llm.get_metrics() if found.name == "vllm:num_preemptions")
    assert preempted > 0
    for request, answer in zip(asked, answers, strict=True):
        assert_equal(reference.answer(request), answer)
