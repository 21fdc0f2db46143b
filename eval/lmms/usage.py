# SPDX-License-Identifier: Apache-2.0
"""Costs of requests: of each one with its sample (`--log_samples`), and means in the log and under `throughput`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from lmms_eval.api.instance import TokenCounts
from lmms_eval.models.model_utils.gen_metrics import log_metrics

from vtprune.errors import NothingPrunedError
from vtprune.eval.running.measure import measure
from vtprune.methods.base import Method
from vtprune.report import Report


@dataclass
class Usage(TokenCounts):
    """Tokens of one request. lmms-eval writes `to_dict` to the sample, under `token_counts`."""

    measured: dict[str, Any] = field(default_factory=dict)
    """`visual_tokens` of the prompt, the record of `vtprune.eval.running.measure`, and the costs without pruning"""

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | self.measured


class UsageLog:
    """Costs of the requests of one call.

    Args:
        methods: the methods that prune.
    """

    def __init__(self, methods: Sequence[Method]):
        self._asked = any(method.keep_ratio != 1.0 for method in methods)
        self._usages: list[Usage] = []
        self._seconds = 0.0

    def add(self, report: Report, indices: Sequence[int], lengths: Sequence[int], seconds: float) -> list[Usage]:
        """One usage for each sample of the batch that `report` describes.

        Args:
            report: of the batch.
            indices: the document that each sample is.
            lengths: tokens that were generated for each.
            seconds: that the batch took.
        """
        usages = []
        for sample, record in enumerate(measure(report, indices)):
            visual = report.original_tokens[sample]
            unpruned = {
                "unpruned_prefill_flops": report.sample_unpruned_prefill_flops[sample],
                "unpruned_kv_bytes": report.sample_unpruned_kv_bytes[sample],
            }
            measured = {"visual_tokens": visual, **record, **unpruned}
            usages.append(Usage(report.text_tokens[sample] + visual, lengths[sample], measured=measured))
        self._usages += usages
        self._seconds += seconds
        return usages

    def close(self) -> None:
        """Logs the means. If there are several processes, each logs its means; lmms-eval keeps those of the first.

        Raises:
            NothingPrunedError: a method ran, visual tokens came, and not one was dropped.
        """
        if not self._usages:
            return
        measured = [usage.measured for usage in self._usages]
        visual = sum(record["visual_tokens"] for record in measured)
        share = sum(record["average_tokens"] for record in measured) / visual if visual else 1.0
        if self._asked and visual and share == 1.0:
            raise NothingPrunedError(f"{visual} visual tokens came, and none was dropped in the whole run")
        new = sum(usage.output_tokens for usage in self._usages)
        means = {
            key: mean(record[key] for record in measured)
            for key in ("visual_tokens", "final_tokens", "average_tokens", "prefill_flops", "kv_bytes")
        }
        log_metrics(
            total_elapsed_time=self._seconds,
            total_gen_tokens=new,
            avg_speed=new / self._seconds,
            additional_metrics={"total_requests": len(measured), "keep_ratio": share, **means},
        )
