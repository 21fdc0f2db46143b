# SPDX-License-Identifier: Apache-2.0
"""What an adapter states about pictures of the media that the encoder was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


class Pictures:
    """The pictures behind the grids of visual tokens; pages of evaluations show them."""

    def pictures(self, kind: str, inputs: Mapping[str, Any]) -> Sequence[Sequence[Tensor]] | None:
        """(3, height, width) for each grid of each medium of an encode call, with pixels as the processor made them.
        The rows and columns of the grid share it evenly; frames that share tokens are averaged.

        inputs: the call's arguments. None if `Adapter.pixels` has such pictures, or patches as Qwen's processors pack
        them.
        """
        return None
