# SPDX-License-Identifier: Apache-2.0
"""The count of waits: what it takes from a trace of a GPU, and that it finds the reads of a method on a CPU."""

import torch

import vtprune
from vtprune.eval.bench.shapes import SHAPES, build_model, random_inputs

SCRIPT = "bench_stalls"


def event(category, name, at, number=None):
    return {"cat": category, "name": name, "ts": at, "args": {} if number is None else {"correlation": number}}


def test_waits_of_a_gpu_count_where_the_host_waits(script):
    trace = [
        event("user_annotation", script.FIRST_LAYER, 100),
        event("cuda_runtime", "cudaStreamSynchronize", 50),
        event("cuda_runtime", "cudaDeviceSynchronize", 99),
        event("cuda_runtime", "cudaStreamSynchronize", 101),
        event("cuda_runtime", "cudaLaunchKernel", 10, 7),
        # started before the first layer, done behind it
        event("cuda_runtime", "cudaMemcpyAsync", 60, 8),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 140, 8),
        event("cuda_runtime", "cudaMemcpyAsync", 110, 9),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 150, 9),
        event("cuda_runtime", "cudaMemcpyAsync", 70, 10),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 71, 10),
        event("cpu_op", "aten::_local_scalar_dense", 20),
    ]
    assert script.waits(trace, gpu=True) == {"waits": 2, "copies": 1, "all_waits": 3, "all_copies": 2}
    assert script.waits(trace, gpu=False) == {"waits": 1, "copies": 1, "all_waits": 1, "all_copies": 2}


def test_reads_of_a_choice_are_found_on_a_cpu(script, monkeypatch):
    model = build_model(SHAPES["small"], 4, "float32", "sdpa", "cpu")
    inputs = random_inputs(SHAPES["small"], model, batch=1, text_tokens=8)
    select = vtprune.Uniform.select

    def reading(self, tokens):
        for _ in range(30):
            torch.ones(2).sum().item()
        return select(self, tokens)

    _, uniform = script.count(model, inputs, ["uniform"], 0.5)
    assert "keep_ratio" in script.count(model, inputs, ["uniform"], 2.0)[1]["refused"]
    monkeypatch.setattr(vtprune.Uniform, "select", reading)
    full, slow = script.count(model, inputs, ["uniform"], 0.5)
    assert slow["waits"] == uniform["waits"] + 30 and slow["all_waits"] == uniform["all_waits"] + 30
    assert full["waits"] < slow["waits"]
    lines = script.table([full, slow, {"method": "gone", "refused": "why"}]).splitlines()
    assert lines[3].startswith(f"| uniform | {slow['waits']} | 0 |") and lines[4] == "| gone | – | – | – | – |"
    assert not model.get_decoder().layers[0]._forward_pre_hooks
