# SPDX-License-Identifier: Apache-2.0
"""Hooks that are off a model while no call wants them: on every decoder layer they would cost each generated token
some time, and most tokens are computed without any of them."""

from __future__ import annotations

import threading
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from vtprune.graphs import runs_between_graphs


@dataclass(frozen=True)
class _Place:
    """A module with one hook, and where it stands."""

    siblings: MutableMapping[str, nn.Module | None]
    """By name, what its parent holds."""
    name: str
    module: nn.Module
    handle: RemovableHandle

    @property
    def is_eager(self) -> bool:
        """Whether the parent still calls this very module, and runs it without a graph."""
        return self.siblings.get(self.name) is self.module and self.module._compiled_call_impl is None


class RestingHooks:
    """Hooks on parts of one model. Each thread says for each of its calls whether it wants them.

    They are on unless a call says that it does not want them and no thread is in one that does. A graph is made with
    the hooks that are there, and is not made anew when others come, so that once there may be graphs, they stay on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: set[threading.Thread] = set()
        self._places: list[_Place] = []
        self._off: list[tuple[MutableMapping[int, Any], int, Any]] = []
        self._stay = False

    def add(self, parent: Any, module: nn.Module, handle: RemovableHandle) -> RemovableHandle:
        """Take over the only hook of these on a module, which is a part of `parent`; returns its handle."""
        siblings = getattr(parent, "_modules", {})
        name = next((name for name, part in siblings.items() if part is module), None)
        if name is None:  # nobody could tell whether it was replaced by a graph
            self._stay = True
        else:
            self._places.append(_Place(siblings, name, module, handle))
        return handle

    def stay(self) -> None:
        """Have the hooks on from now on."""
        with self._lock:
            self._stay = True
            self._put_on()

    def want(self) -> None:
        """Have them on until this thread says `leave`."""
        with self._lock:
            self._wanted.add(threading.current_thread())
            self._put_on()

    def leave(self) -> None:
        """The call of this thread has ended."""
        if self._wanted:
            self._wanted.discard(threading.current_thread())

    def rest(self) -> None:
        """The call of this thread does not want them."""
        if self._stay or not self._places:
            return
        if runs_between_graphs() or not all(place.is_eager for place in self._places):
            self.stay()
        elif not self._off:
            self._take_off()

    def forget(self) -> None:
        """Forget the hooks, once they are removed."""
        with self._lock:
            self._places, self._off, self._stay = [], [], False
            self._wanted.clear()

    def _take_off(self) -> None:
        with self._lock:
            if self._off:
                return
            hooks = [(place.handle.hooks_dict_ref(), place.handle.id) for place in self._places]
            # Beside hooks of others, ours could not come back to where they were among them.
            if self._wanted or self._stay or any(there is None or list(there) != [number] for there, number in hooks):
                return
            self._off = [(there, number, there.pop(number)) for there, number in hooks]

    def _put_on(self) -> None:
        """With the lock held."""
        off, self._off = self._off, []
        for there, number, hook in off:
            there[number] = hook
            there.move_to_end(number, last=False)
