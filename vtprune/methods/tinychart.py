# SPDX-License-Identifier: Apache-2.0
"""TinyChart: ToMe with 84 merges in every layer of a SigLIP encoder for images of 768 pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.methods.tome import ToMe


@dataclass(frozen=True, kw_only=True)
class TinyChart(ToMe):
    """The token merging of TinyChart's vision encoder (arXiv 2404.16635): ToMe with its own schedule.

    Stage: inside the vision encoder. 84 tokens merge in each of the 26 layers, which leaves 732 of 2916 patches. The
    attention is proportional. Deviations: none.

    Fields
        r: as of `tome`; 84 if there is neither r nor keep_ratio nor keep_tokens.
    """

    name: ClassVar[str] = "tinychart"
    paper: ClassVar[str] = "arXiv 2404.16635"
    needs_budget: ClassVar[bool] = False

    def published(self, layers: int, patches: int) -> list[int]:
        return [84] * layers
