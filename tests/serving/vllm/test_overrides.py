# SPDX-License-Identifier: Apache-2.0
"""What the plug-in overrides is there in vLLM, under the same names.

vLLM's own pruning of videos stopped working when the code around it was rebuilt: what was overridden or appended was no
longer looked at. A method of ours that no longer overrides anything would prune nothing, and say nothing.
"""

from __future__ import annotations

import inspect

import pytest
from vllm.model_executor.models.registry import ModelRegistry
from vllm.multimodal.processing import BaseMultiModalProcessor

import vtprune.serving.vllm as plugin
from vtprune.serving.vllm.encoding import PrunesEmbeddings
from vtprune.serving.vllm.positions import RanksPositions
from vtprune.serving.vllm.processing import PrunesPlaceholders

OWN = {
    "_encode",
    "_request",
    "_adapter",
    "_vtprune_embed",
}
"""Methods that are the plug-in's alone."""


@pytest.fixture(scope="module", params=plugin.ARCHITECTURES)
def model(request):
    plugin.register()
    return ModelRegistry.models[request.param].load_model_cls()


def overridden(mixin: type) -> set[str]:
    return {name for name, value in vars(mixin).items() if inspect.isfunction(value)} - OWN


def assert_overrides(mixin: type, original: type) -> None:
    """The original has each method of a mixin, under the same names of arguments."""
    for name in overridden(mixin) - {"__init__", "get_dummy_mm_inputs", "embed_multimodal"}:
        theirs = list(inspect.signature(getattr(original, name)).parameters)
        assert list(inspect.signature(getattr(mixin, name)).parameters) == theirs, name
    assert all(hasattr(original, name) for name in overridden(mixin))


def test_each_method_overrides_one_of_the_model(model):
    original = plugin.ORIGINALS[model.__name__].load_model_cls()
    assert issubclass(model, original) and issubclass(model, PrunesEmbeddings)
    assert_overrides(PrunesEmbeddings, original)
    assert issubclass(model, RanksPositions) == hasattr(original, "get_mrope_input_positions")
    if issubclass(model, RanksPositions):
        assert_overrides(RanksPositions, original)


def test_each_method_overrides_one_of_the_processor(model):
    assert_overrides(PrunesPlaceholders, BaseMultiModalProcessor)
