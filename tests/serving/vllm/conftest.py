# SPDX-License-Identifier: Apache-2.0
"""Engines of vLLM, where it is installed: `make test-vllm`."""

from __future__ import annotations

import importlib.util
import os

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
