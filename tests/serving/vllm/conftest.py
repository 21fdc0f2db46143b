# SPDX-License-Identifier: Apache-2.0
"""Engines of vLLM, where it is installed: `make test-vllm`."""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import ExitStack

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

# vLLM reads these when it is imported.
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_DO_NOT_TRACK="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="1",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    VLLM_WORKER_MULTIPROCESSING_METHOD="spawn",
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where checkpoints are written."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def engine_of(folder):
    """Family -> an engine without a setting. The last two stay: starting one is slow."""
    from .checkpoints import save
    from .serving import engine

    running: dict[str, tuple] = {}

    def of(name):
        if name not in running:
            if len(running) == 2:
                running.pop(next(iter(running)))[1].close()
            stack = ExitStack()
            running[name] = stack.enter_context(engine(save(name, folder), max_model_len=1024)), stack
        running[name] = running.pop(name)  # the one used last goes last
        return running[name][0]

    yield of
    for _, stack in running.values():
        stack.close()


@pytest.fixture(scope="session")
def reference_of(folder):
    """Family -> transformers with vtprune."""
    from .checkpoints import save
    from .serving import Reference

    return functools.cache(lambda name: Reference(save(name, folder)))
