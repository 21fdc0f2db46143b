# SPDX-License-Identifier: Apache-2.0
"""Graphs of torch (compiled, scripted, traced, exported): made before a session they leave its hooks out, and made
afterwards they are to have the hooks between them. All that is private to torch stands here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils.hooks import RemovableHandle


def is_graph(module: nn.Module) -> bool:
    """Whether a module, or a function that stands in it for one of its own, was made a graph.

    A function that is compiled and calls the module leaves no trace in it: the caches of the compiler belong to code,
    which all models of a class share.
    """
    if isinstance(module, torch.jit.ScriptModule | GraphModule):
        return True
    own = [value for name, value in vars(module).items() if not name.startswith("_")]
    compiled_in_place = getattr(module, "_compiled_call_impl", None) is not None
    return compiled_in_place or hasattr(module, "_orig_mod") or any(map(_is_compiled, [module.forward, *own]))


def _is_compiled(value: Any) -> bool:
    # What is kept out of graphs has the first mark, too.
    return hasattr(value, "_torchdynamo_orig_callable") and not getattr(value, "_torchdynamo_disable", False)


_between = False


def runs_between_graphs() -> bool:
    """Whether any hook ever ran between the graphs of a compiled model, in this process."""
    return _between


OUTSIDE = object()
"""What a stand-in returns if the hook itself has to run."""


def in_graphs(stand_in: Callable) -> Callable[[Callable], Callable]:
    """Decorates a hook: a graph takes in `stand_in` instead of it, with the same arguments, unless that returns
    `OUTSIDE`. It may depend on its arguments only, and on what never changes while a session lasts."""

    def mark(hook: Callable) -> Callable:
        hook.stand_in = stand_in  # type: ignore[attr-defined]
        return hook

    return mark


def _noted(hook: Callable) -> Callable:
    """The same hook, which notes that it ran."""

    def noting(*args, **kwargs):
        global _between
        _between = True
        return hook(*args, **kwargs)

    return noting


class _OutsideGraphs:
    """A hook that a compiled model calls between its graphs, instead of taking it into them.

    What hooks do depends on the state of a call, for which a graph would be made anew time and again. An object and not
    a function, because a copy of it then reaches what the hook is bound to.
    """

    def __init__(self, hook: Callable):
        self.hook = hook
        self.undisturbed = torch.compiler.disable(_noted(hook))
        stand_in = getattr(hook, "stand_in", None)
        owner = getattr(hook, "__self__", None)
        self.stand_in = stand_in if stand_in is None or owner is None else stand_in.__get__(owner)

    def __call__(self, *args, **kwargs):
        # To stay out of graphs costs time, so only where there are any.
        if not torch.compiler.is_compiling():
            return self.hook(*args, **kwargs)
        result = OUTSIDE if self.stand_in is None else self.stand_in(*args, **kwargs)
        return self.undisturbed(*args, **kwargs) if result is OUTSIDE else result


def outside_graphs(handle: Any) -> Any:
    """Has the hook behind a handle run outside of the graphs of a model that is compiled later; returns the handle."""
    if isinstance(handle, RemovableHandle):
        hooks = handle.hooks_dict_ref()
        hooks[handle.id] = _OutsideGraphs(hooks[handle.id])
    return handle
