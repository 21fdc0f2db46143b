# SPDX-License-Identifier: Apache-2.0
"""Counts the FLOPs of choices while methods make them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, Protocol, Self

from vtprune.errors import ConfigError

Profile = bool | Literal["flops"]
"""What a session measures beside what it reports anyway: nothing (False), times (True), or the FLOPs of choices."""


def check_profile(profile: Profile) -> None:
    """Raise ConfigError if it is none of the three."""
    if not isinstance(profile, bool) and profile != "flops":
        raise ConfigError(
            f"profile={profile!r}: expected False, True (times) or 'flops' (the FLOPs of choosing tokens)"
        )


class Counted(Protocol):
    """What choices are made for: a prefill, a run of the vision encoder, a batch of images."""

    selection_flops: int
    """FLOPs of the choices so far, two for each multiply-add of matrix products."""


def counting(into: Counted, profile: Profile) -> AbstractContextManager[None]:
    """While it lasts, the FLOPs of what this thread computes are added to `into` if the session counts them."""
    # Each operation takes tens of microseconds longer while it is counted, so this is only done on request.
    return _counting(into) if profile == "flops" else nullcontext()


@contextmanager
def _counting(into: Counted) -> Iterator[None]:
    # These pull in the compiler, which takes seconds.
    from torch.utils.flop_counter import FlopCounterMode
    from torch.utils.module_tracker import ModuleTracker

    class NoModules(ModuleTracker):
        """Tracks no modules, for counts by module are not wanted. Tracking would put hooks on the modules of all
        threads, which fail when two threads are in modules of one class."""

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with counter:
        yield
    into.selection_flops += counter.get_total_flops()
