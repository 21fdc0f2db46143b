# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from . import models


def pytest_addoption(parser):
    parser.addoption("--update-support", action="store_true", help="write docs/support.md instead of comparing with it")


@pytest.fixture(autouse=True)
def _one_thread_no_gradients(one_thread):
    with torch.no_grad():
        yield


@pytest.fixture(params=["mha", "gqa", "siglip"])
def model(request):
    return models.shared(request.param)


@pytest.fixture
def mha():
    return models.shared("mha")


@pytest.fixture
def gqa():
    return models.shared("gqa")
