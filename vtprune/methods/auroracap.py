# SPDX-License-Identifier: Apache-2.0
"""AuroraCap: ToMe with the same small number of merges in every layer of the vision encoder, attention unweighted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.errors import BudgetError
from vtprune.methods.base import KeepRatio
from vtprune.methods.tome import ToMe


@dataclass(frozen=True, kw_only=True)
class AuroraCap(ToMe):
    """The token merging of AuroraCap's vision encoder (arXiv 2410.03051): ToMe with another schedule.

    Stage: inside the vision encoder. Every layer merges `patches * (1 - token_kept_ratio) / layers` tokens, rounded
    down, so the ratio is not met exactly: of 729 patches and 48 layers, 0.1 leaves 105. Sizes weight the means. The
    reference adds them to the attention in a way that the softmax cancels, so there is no proportional attention.
    Deviations: none.

    Fields
        token_kept_ratio: nominal share of the patches that is left, in (0, 1], default 0.2. Instead of it, r,
            keep_ratio or keep_tokens, as of `tome`.
        prop_attn: default False, as trained.
    """

    name: ClassVar[str] = "auroracap"
    paper: ClassVar[str] = "arXiv 2410.03051"
    needs_budget: ClassVar[bool] = False

    token_kept_ratio: KeepRatio | None = None
    prop_attn: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.token_kept_ratio is not None and self._has_budget:
            raise BudgetError(f"{self.name}: give one of token_kept_ratio, r, keep_ratio and keep_tokens")

    def published(self, layers: int, patches: int) -> list[int]:
        kept = 0.2 if self.token_kept_ratio is None else self.token_kept_ratio
        return [int(patches * (1 - kept) / layers)] * layers
