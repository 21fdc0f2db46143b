# SPDX-License-Identifier: Apache-2.0
"""Methods and models of other packages in the matrix, found by their entry points. Without such packages, no tests.

`vtprune.testing.check_method` is what such a package runs itself.
"""

import pytest

from vtprune.plugins import load_plugins
from vtprune.testing import check_method
from vtprune.testing.method_kit import models_of_others

from .matrix import refusal
from .methods import METHODS, spec

OUTSIDE: list = []
load_plugins("vtprune.methods", OUTSIDE.append)


@pytest.mark.parametrize("method", OUTSIDE, ids=lambda method: method.name)
def test_method_of_another_package(method):
    results = check_method(method, media=("image", "video", "mixed"))
    assert any(result.passed for result in results)


@pytest.mark.parametrize("name", [name for name, methods in METHODS.items() if len(methods) == 1])
@pytest.mark.parametrize("case", [pytest.param(case, id=type(case.model).__name__) for case in models_of_others()])
def test_model_of_another_package(case, name):
    (method,) = spec(name)
    if refusal(case.model, [method]) is not None:
        return
    assert check_method(method, [case])
