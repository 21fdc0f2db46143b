# SPDX-License-Identifier: Apache-2.0
"""The life of a session, on whatever model: hooks go on, one session at a time, and come off."""

from __future__ import annotations

import warnings
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, Self

from torch import nn

from vtprune.errors import UnsupportedModelError, VTPruneError
from vtprune.graphs import is_graph, outside_graphs
from vtprune.methods.base import Method
from vtprune.stages.hooks import Uncopied

ACTIVE: weakref.WeakKeyDictionary[nn.Module, weakref.ref[SessionLife]] = weakref.WeakKeyDictionary()
"""Module -> the session that is on it: language models and vision encoders, so that wrappers of one model count as one.
Both references are weak, because a session refers to its model."""


def _active(module: nn.Module) -> SessionLife | None:
    """The session that is on a module."""
    reference = ACTIVE.get(module)
    return None if reference is None else reference()


class Calls(Protocol):
    """The hooks of a session."""

    prunes: bool
    """Whether any method asks for less than everything."""
    reached: bool
    """Whether any call reached the hooks since they are on."""

    def install(self) -> Iterator[Any]:
        """Yields what takes each hook off again, as soon as it is on."""

    def stop(self) -> None:
        """Let later calls run as they are, and wait for those that other threads are in."""

    def forget(self) -> None:
        """Forget all calls, once the hooks are off."""


class SessionLife(Uncopied):
    """Hooks on one model, until they are removed."""

    adapter: Any
    """The facts of the model."""
    _calls: Calls

    def __init__(
        self, homes: Iterable[nn.Module], modules: Iterable[nn.Module], methods: list[Method], *, strict: bool
    ):
        """homes: the modules that one session at a time may be on. modules: all that may not be graphs.

        Raises UnsupportedModelError if a module is compiled, traced or exported.
        """
        found = next(filter(is_graph, modules), None)
        if found is not None:
            raise UnsupportedModelError(
                f"this model is compiled, traced or exported ({type(found).__name__} is, at least); pruning works by "
                "hooks, which a graph leaves out: prune the uncompiled model, and compile it in the session"
            )
        self.methods = methods
        self.strict = strict
        self._homes = tuple(homes)
        self._entered = False
        self._handles: list = []

    @property
    @abstractmethod
    def report(self) -> Any:
        """What the last call kept, where, and what that saved; None before one."""

    def __repr__(self) -> str:
        methods, state = " + ".join(method.name for method in self.methods), "active" if self._handles else "not active"
        return f"vtprune session: {methods} on {type(self.adapter.model).__name__}, {state}"

    def install(self) -> None:
        """Put the hooks on the model. Raises VTPruneError if a session is on it already."""
        if any(_active(home) is not None for home in self._homes):
            raise VTPruneError(
                "a vtprune session is active on this model already; remove it first, or pass a list of methods to "
                "compose them in one session"
            )
        ACTIVE.update((home, weakref.ref(self)) for home in self._homes)
        try:
            # One at a time: what an adapter states wrongly fails half way, and then everything has to come off again.
            for handle in self._calls.install():
                self._handles.append(outside_graphs(handle))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take the hooks off; the model is exactly what it was. Idempotent."""
        self._calls.stop()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for home in self._homes:
            if _active(home) is self:
                del ACTIVE[home]
        self._entered = False
        self._calls.forget()

    def __enter__(self) -> Self:
        if self._entered:
            raise VTPruneError(
                "this session is entered already, and leaving it once would end it for the block around, too; open it "
                "in one place only"
            )
        if not self._handles:
            self.install()
        self._entered = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        unseen = self.strict and self._calls.prunes and not self._calls.reached and error is None
        self.remove()
        if unseen:
            warnings.warn(
                "no call of the model reached this vtprune session, so nothing was pruned; a function that was "
                "compiled or traced before the session began leaves its hooks out (pass strict=False if there was no "
                "call)",
                UserWarning,
                stacklevel=2,
            )
