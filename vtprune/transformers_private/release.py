# SPDX-License-Identifier: Apache-2.0
"""Which release of transformers is installed, and what is known of it."""

from __future__ import annotations

import functools
import warnings

from torch import nn
from transformers import __version__ as VERSION

from vtprune.errors import UnsupportedModelError

OLDEST, NEWEST = (5, 18), (5, 24)
"""Minor releases of transformers that the tests run on."""


def version() -> tuple[int, int]:
    major, minor = VERSION.split(".")[:2]
    return int(major), int(minor)


def releases() -> str:
    """The installed release and the tested ones, for messages."""
    (first, oldest), (last, newest) = OLDEST, NEWEST
    return f"installed is transformers {VERSION}, and vtprune is tested with {first}.{oldest} to {last}.{newest}"


def is_tested_release() -> bool:
    """Whether the installed release is one that the tests run on."""
    return OLDEST <= version() <= NEWEST


def is_own(module: nn.Module) -> bool:
    """Whether the class of a model's part comes with transformers, and not from a checkpoint or another package."""
    return type(module).__module__.startswith("transformers.models.")


def check_release() -> None:
    """Raise UnsupportedModelError on a release that is too old; warn, once a process, on one that is not tested yet."""
    if version() < OLDEST:
        raise UnsupportedModelError(f"this release of transformers is too old: {releases()}")
    if version() > NEWEST:
        _warn_untested()


@functools.cache
def _warn_untested() -> None:
    warnings.warn(
        f"{releases()}; run `vtprune doctor` to see whether pruning is right with it", UserWarning, stacklevel=2
    )
