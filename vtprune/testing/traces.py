# SPDX-License-Identifier: Apache-2.0
"""What a session could leave behind: on a model, and in the random state that all code shares."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

HOOK_TABLES = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
]


def fingerprint(model) -> dict[str, Any]:
    """Everything about a model that a session could leave behind, except the values of its weights."""
    state = {}
    for name, module in model.named_modules():
        state[name] = (
            type(module),
            {table: list(getattr(module, table).items()) for table in HOOK_TABLES if hasattr(module, table)},
            sorted(vars(module)),
            sorted(module._buffers),
            module.training,
        )
    return {
        "modules": state,
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "attention": model.config._attn_implementation,
        "attention functions": dict(ALL_ATTENTION_FUNCTIONS),
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What two fingerprints of a model differ in: names of its modules, and of the other entries."""
    modules = before["modules"].keys() | after["modules"].keys()
    differing = [
        name or "the model" for name in sorted(modules) if before["modules"].get(name) != after["modules"].get(name)
    ]
    return differing + [key for key in before if key != "modules" and before[key] != after[key]]


def back_ends(model) -> list[str]:
    """The attention back end that each module's config names."""
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


def random_state() -> tuple[Any, ...]:
    """The state of the random generators that all code shares: torch's, Python's and numpy's."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def same_random_state(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two states of `random_state` are the same."""
    numpys = zip(one[2], other[2], strict=True)
    return torch.equal(one[0], other[0]) and one[1] == other[1] and all(np.array_equal(a, b) for a, b in numpys)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All of them seeded; as they were afterwards."""
    _, python, numpy = random_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
