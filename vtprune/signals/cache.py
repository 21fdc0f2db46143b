# SPDX-License-Identifier: Apache-2.0
"""Signals that are read after the prefill, of the KV cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from vtprune.stages.layout import Groups


class CacheView(Protocol):
    """What a signal may look at once the KV cache of a prompt is filled."""

    @property
    def groups(self) -> Groups:
        """The visual tokens of each sample in one cache layer."""

    def alive(self, layer: int) -> Tensor:
        """(groups, tokens) bool: which of them a decoder layer computed, 0-based; -1 is the last."""


class CacheSignal(ABC):
    """A signal that is read once after the prefill, by a method that drops visual tokens from the KV cache."""

    @abstractmethod
    def read_cache(self, view: CacheView) -> Any:
        """The signal of the visual tokens of one cache layer."""
