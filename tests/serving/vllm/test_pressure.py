# SPDX-License-Identifier: Apache-2.0
"""Right where memory is short: preempted requests, and images that come many at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .checkpoints import save
from .serving import A, B, C, D, Reference, Request, assert_equal, engine, serve

pytestmark = pytest.mark.slow

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


_CALLS = """
import json, sys
from pathlib import Path

import vtprune.serving.vllm.encoding as encoding
from serving.vllm.serving import Request, engine, picture, serve

if __name__ == "__main__":
    path = Path(sys.argv[1])
    calls = []
    original = encoding.PrunesEmbeddings._encode

    def counted(self, kind, inputs, plans, adapter):
        calls.append([plan.total for plan in plans])
        return original(self, kind, inputs, plans, adapter)

    encoding.PrunesEmbeddings._encode = counted
    with engine(path, max_num_batched_tokens=128) as llm:
        method = {"name": "divprune", "keep_ratio": 0.11}
        serve(llm, path.name, [Request("{image} who ?", [picture(40, 40, number)], method) for number in range(8)])
    print("CALLS", json.dumps(calls))
"""


def test_the_encoder_is_given_no_more_tokens_at_once_than_without_pruning(folder, tmp_path):
    """The engine in this process, so that its calls can be watched."""
    script = tmp_path / "calls.py"
    script.write_text(_CALLS)
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    path = save("llava", folder)
    done = subprocess.run([sys.executable, script, path], env=env, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("CALLS "))
    calls = json.loads(line.removeprefix("CALLS "))
    assert sum(map(len, calls)) == 8 and max(map(sum, calls)) <= 128
    assert max(map(len, calls)) > 1
