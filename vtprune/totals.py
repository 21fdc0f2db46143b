# SPDX-License-Identifier: Apache-2.0
"""What a session saved over all of its prefills."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vtprune.report_table import HEADER, row

if TYPE_CHECKING:
    from vtprune.report import Report


@dataclass(frozen=True)
class Totals:
    """All prefills of a session, added up."""

    prefills: int = 0
    """Calls on an empty KV cache. Without a cache a prompt with images counts once, text alone for every token."""
    samples: int = 0
    text_tokens: int = 0
    original_tokens: int = 0
    """Visual tokens of the prompts."""
    kept_tokens: float = 0.0
    """Those that were kept, averaged over the LLM's layers."""
    prefill_flops: float = 0.0
    unpruned_prefill_flops: float = 0.0
    """FLOPs of the language model, as in `Report`."""

    @property
    def keep_ratio(self) -> float:
        """Visual tokens kept over all that came; 1.0 without any."""
        return self.kept_tokens / self.original_tokens if self.original_tokens else 1.0

    def __add__(self, report: Report) -> Totals:
        return Totals(
            self.prefills + 1,
            self.samples + report.samples,
            self.text_tokens + sum(report.text_tokens),
            self.original_tokens + sum(report.original_tokens),
            self.kept_tokens + float(report.counts.sum()) / report.depth,
            self.prefill_flops + report.prefill_flops,
            self.unpruned_prefill_flops + report.unpruned_prefill_flops,
        )

    def __str__(self) -> str:
        lines = [
            f"{self.prefills} prefill(s), {self.samples} sample(s), {self.text_tokens} text tokens",
            HEADER,
            row("visual tokens, average", self.kept_tokens, self.original_tokens),
            row("prefill GFLOPs", self.prefill_flops / 1e9, self.unpruned_prefill_flops / 1e9),
        ]
        return "\n".join(lines)

    __repr__ = __str__
