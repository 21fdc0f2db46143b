# SPDX-License-Identifier: Apache-2.0
"""Sessions on vision encoders alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import chain

from torch import nn

from vtprune.adapters.encoder import EncoderAdapter
from vtprune.callers import PerCaller
from vtprune.encoder_report import EncoderReport, LayerWeights
from vtprune.errors import ConfigError, NothingPrunedError, UnsupportedStageError
from vtprune.methods.base import Method
from vtprune.methods.in_layers import InLayers
from vtprune.session_life import SessionLife
from vtprune.stages.choosing import Profile
from vtprune.stages.encoder_pass import EncoderPass
from vtprune.stages.layer_calls import LayerCalls
from vtprune.totals import EncoderTotals


class EncoderSession(SessionLife):
    """One vision encoder with hooks on it. Use `vtprune.prune` or `vtprune.patch` to make one.

    Several threads may call the model at the same time.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: EncoderAdapter,
        methods: list[Method],
        *,
        strict: bool,
        profile: Profile = False,
        follows: Callable[[], bool] = lambda: True,
    ):
        """model: what the adapter was found for, which may be a wrapper. follows: whether images that come now are the
        session's."""
        if profile is True:
            raise ConfigError(
                "profile=True measures the times of vision-language models, and this is a vision encoder alone; "
                "profile='flops' counts the FLOPs of choosing tokens"
            )
        self.adapter, self._profile = adapter, profile
        name = type(adapter.model).__name__
        for method in methods:
            if not isinstance(method, InLayers):
                raise UnsupportedStageError(
                    f"{method.name} does not act inside the layers of a vision encoder, and {name} is an encoder "
                    "alone; methods that do: tome, mctf, zero_tprune"
                )
        if len(methods) > 1:
            raise ConfigError(f"{', '.join(m.name for m in methods)}: only one method acts inside a vision encoder")
        (method,) = methods
        method.check_budget(adapter.shape)
        super().__init__([adapter.tower], chain(model.modules(), adapter.model.modules()), methods, strict=strict)
        self._reports: PerCaller[EncoderReport] = PerCaller()
        self._totals, self._lock = EncoderTotals(), threading.Lock()
        self._weights = LayerWeights.of(adapter)
        self._calls = LayerCalls(adapter, method, self._finished, profile=profile, follows=follows)

    @property
    def report(self) -> EncoderReport | None:
        """The last batch of images of this thread (or asyncio task); None before one.

        A thread that encoded none is given that of another one if there is only one; with several, VTPruneError.
        """
        return self._reports.get()

    @property
    def totals(self) -> EncoderTotals:
        """All batches since the session was made, of all threads."""
        return self._totals

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{self.totals}"

    def _finished(self, batch: EncoderPass) -> None:
        report = EncoderReport(
            model_name=type(self.adapter.model).__name__,
            methods=tuple(method.name for method in self.methods),
            images=batch.images,
            prefix_tokens=self.adapter.prefix_tokens,
            entered=tuple(batch.entered),
            in_mlp=tuple(batch.in_mlp),
            left=tuple(batch.left),
            tokens=batch.tokens,
            weights=self._weights,
            merged_into=batch.sources,
            selection_flops=batch.selection_flops if self._profile == "flops" else None,
        )
        self._reports.set(report)
        with self._lock:
            self._totals += report
        wants_less = any(batch.schedule) or self.methods[0].keep_ratio not in (None, 1.0)
        if self.strict and wants_less and report.final_tokens == report.original_tokens:
            raise NothingPrunedError(
                f"{', '.join(report.methods)}: {report.original_tokens} patches came and none was merged or dropped "
                "(pass strict=False to allow it)"
            )
