# SPDX-License-Identifier: Apache-2.0
"""What a session saved over all of its prefills, or over all of the batches of a vision encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vtprune.report_table import HEADER, row

if TYPE_CHECKING:
    from vtprune.encoder_report import EncoderReport
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


@dataclass(frozen=True)
class EncoderTotals:
    """All batches of images of a session on a vision encoder alone, added up."""

    batches: int = 0
    images: int = 0
    original_tokens: int = 0
    """Patches of all images."""
    final_tokens: int = 0
    """Those that were left behind the last layer."""
    encoder_flops: int = 0
    unpruned_encoder_flops: int = 0
    """FLOPs of the encoder, as in `EncoderReport`."""

    @property
    def keep_ratio(self) -> float:
        """Patches left behind the last layer over all that came; 1.0 without any."""
        return self.final_tokens / self.original_tokens if self.original_tokens else 1.0

    def __add__(self, report: EncoderReport) -> EncoderTotals:
        return EncoderTotals(
            self.batches + 1,
            self.images + report.images,
            self.original_tokens + report.images * report.original_tokens,
            self.final_tokens + report.images * report.final_tokens,
            self.encoder_flops + report.encoder_flops,
            self.unpruned_encoder_flops + report.unpruned_encoder_flops,
        )

    def __str__(self) -> str:
        lines = [
            f"{self.batches} batch(es), {self.images} image(s)",
            HEADER,
            row("patches, final", self.final_tokens, self.original_tokens),
            row("encoder GFLOPs", self.encoder_flops / 1e9, self.unpruned_encoder_flops / 1e9),
        ]
        return "\n".join(lines)

    __repr__ = __str__
