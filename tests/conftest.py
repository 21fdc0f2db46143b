# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests of every folder."""

import gc
import importlib
from pathlib import Path

import pytest
import torch

from vtprune.testing import families

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Families that the installed transformers lacks are skipped.

    Of kindred families the default run has some cells of the matrix; what else goes through all families is slow.
    """
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        for name in {given.get("name"), given.get("family")} & set(families.NAMES):
            if not families.is_available(name):
                item.add_marker(pytest.mark.skip(reason=f"not installed: what {name} needs"))
            if name in families.KINDRED and item.path.name != "test_matrix.py":
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """Thousands of tests and a few large libraries lie in memory for good: collections need not go through them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def script(request):
    """The module in `scripts/` that the test module names as its `SCRIPT`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)  # scripts import each other
        return importlib.import_module(request.module.SCRIPT)


@pytest.fixture
def one_thread():
    """Models this small run faster on one thread, and results do not depend on how work is split."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
