# SPDX-License-Identifier: Apache-2.0
"""What belongs to one thread, or to one caller, while several use a model at the same time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from vtprune.errors import VTPruneError

T = TypeVar("T")


Caller = threading.Thread | asyncio.Task


def caller() -> Caller:
    """The asyncio task that runs, or the thread if there is none."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        task = None
    return threading.current_thread() if task is None else task


def lives(other: Caller) -> bool:
    """Whether a thread or task has not ended."""
    return other.is_alive() if isinstance(other, threading.Thread) else not other.done()


class PerThread(Generic[T]):
    """One value for each thread, made when the thread first asks for it; it is gone when the thread is."""

    def __init__(self, make: Callable[[], T]):
        self._make = make
        self.clear()

    def __call__(self) -> T:
        try:
            return self._local.value
        except AttributeError:
            self._local.value = self._make()
            return self._local.value

    def renew(self) -> None:
        """Let this thread begin with a new value."""
        self._local.value = self._make()

    def clear(self) -> None:
        """Let every thread begin with a new value."""
        self._local = threading.local()


class ThreadAware(Generic[T]):
    """Base of what follows the calls of several threads: `now` is the state of the thread that asks."""

    def __init__(self, make: Callable[[], T]):
        self._following = PerThread(make)

    @property
    def now(self) -> T:
        """What the calling thread is doing."""
        return self._following()

    def end(self) -> None:
        """Forget this thread's call, and everything measured in it."""
        self._following.renew()

    def forget(self) -> None:
        """Forget the calls of all threads."""
        self._following.clear()


class Underway:
    """Which threads are in a call, so that nobody takes away what the call needs before it has ended."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._threads: set[threading.Thread] = set()
        self._waiting = False

    def begin(self) -> None:
        """This thread is in a call."""
        self._threads.add(threading.current_thread())

    def end(self) -> None:
        """This thread has left it."""
        # Every generated token passes here, and hardly ever does anybody wait.
        self._threads.discard(threading.current_thread())
        if self._waiting:
            with self._changed:
                self._changed.notify_all()

    def wait_for_others(self) -> None:
        """Return once no other thread is in a call."""
        own = threading.current_thread()
        self._waiting = True
        with self._changed:
            # A thread may die in a call, and then nobody says so.
            while any(thread.is_alive() for thread in self._threads - {own}):
                self._changed.wait(timeout=1.0)
        self._waiting = False


class PerCaller(Generic[T]):
    """The last value of each caller: of a thread, or of an asyncio task, for tasks take turns in one thread.

    A caller without a value of its own is given that of another one if there is only one: that is who starts a thread
    to generate in, and asks once it has ended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[Caller, T] = {}

    def set(self, value: T) -> None:
        """Replace the caller's value. Values of threads and tasks that have ended go."""
        own = caller()
        with self._lock:
            self._values = {other: last for other, last in self._values.items() if lives(other)} | {own: value}

    def get(self) -> T | None:
        """The caller's value. Raises VTPruneError if only others have one, and it is not clear whose is meant."""
        with self._lock:
            values = dict(self._values)
        own = caller()
        if own in values or not values:
            return values.get(own)
        if len(values) > 1:
            raise VTPruneError(
                f"{len(values)} threads or tasks have called the model, and this one has not: read `session.report` "
                "where the call is made, or `session.totals` for all of them"
            )
        return next(iter(values.values()))

    def replace(self, change: Callable[[T], T]) -> None:
        """Change every caller's value."""
        with self._lock:
            self._values = {own: change(value) for own, value in self._values.items()}
