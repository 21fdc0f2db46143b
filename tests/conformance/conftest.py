# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from . import models


def pytest_addoption(parser):
    parser.addoption("--update-support", action="store_true", help="write docs/support.md instead of comparing with it")


@pytest.fixture(autouse=True)
def _one_thread_no_gradients():
    # Models this small run faster on one thread, and results do not depend on how work is split.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["mha", "gqa", "siglip"])
def model(request):
    return models.shared(request.param)


@pytest.fixture
def mha():
    return models.shared("mha")


@pytest.fixture
def gqa():
    return models.shared("gqa")
