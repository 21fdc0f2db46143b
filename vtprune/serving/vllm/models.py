# SPDX-License-Identifier: Apache-2.0
"""vLLM's model classes with pruning, under their own names; made when vLLM asks for one."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from vtprune.serving.vllm import ARCHITECTURES, ORIGINALS
from vtprune.serving.vllm.encoding import PrunesEmbeddings
from vtprune.serving.vllm.positions import RanksPositions
from vtprune.serving.vllm.processing import PrunesPlaceholders


def __getattr__(name: str) -> type:
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _pruning(name)


@functools.cache
def _pruning(architecture: str) -> type:
    original = ORIGINALS[architecture].load_model_cls()
    # By the methods that a class has vLLM tells what it can do, so a mixin goes only in front of one that has them.
    mixins: list[type] = [RanksPositions] if hasattr(original, "get_mrope_input_positions") else []
    mixins.append(PrunesEmbeddings)
    model: Any = type(architecture, (*mixins, original), {"__module__": __name__, "__doc__": original.__doc__})
    factories = original._processor_factory
    model._processor_factory = dataclasses.replace(factories, processor=_pruning_processor(factories.processor))
    return model


def _pruning_processor(factory: Any) -> Any:
    def make(info: Any, dummy_inputs: Any, **options: Any) -> Any:
        # A factory may be a function that looks at the config. What it makes tells the class.
        return _with_placeholders(type(factory(info, dummy_inputs, **options)))(info, dummy_inputs, **options)

    return make


@functools.cache
def _with_placeholders(original: type) -> type:
    return type(original.__name__, (PrunesPlaceholders, original), {"__module__": __name__})
