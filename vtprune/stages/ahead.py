# SPDX-License-Identifier: Apache-2.0
"""Keys of a decoder layer that a cut on its input has projected already: the layer is handed them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtprune.stages.layout import take_columns


@dataclass
class KeysAhead:
    """What one thread has for the layer that runs next."""

    keys: Tensor | None = None
    """(batch, n, width): output of its projection for the columns that the cut left; None for nothing."""
    skipped: bool = False
    """Whether the projection runs on one column at present."""

    def note(self, keys: Tensor | None, index: Tensor | None, present: Tensor) -> None:
        """Of keys of all columns before a cut, keep those of the columns `index` (batch, n), None for all.

        present: (batch, n) bool, False for padding, whose keys are not those of its states.
        """
        # Choices are made without gradients, which the layer may need.
        if keys is not None and not torch.is_grad_enabled():
            left = keys if index is None else take_columns(keys, index)
            self.keys = left.masked_fill(~present[..., None], 0)


def hand_keys(projection: nn.Module, current: Callable[[], KeysAhead]) -> Iterator[RemovableHandle]:
    """Hooks on a projection of keys, each yielded as soon as it is on: it runs on one column where keys are there.

    current: gives what the calling thread has.
    """

    def skip(module, args):
        ahead = current()
        if ahead.keys is None or len(args) != 1 or args[0].shape[:-1] != ahead.keys.shape[:-1]:
            ahead.keys = None
            return None
        ahead.skipped = True
        return (args[0][:, :1],)

    def hand(module, args, output):
        ahead = current()
        if not ahead.skipped:
            return None
        keys, ahead.keys, ahead.skipped = ahead.keys, None, False
        return keys

    yield projection.register_forward_pre_hook(skip)
    # Whoever else looks at what is projected is to see the keys of all columns.
    yield projection.register_forward_hook(hand, prepend=True)
