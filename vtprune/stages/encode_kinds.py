# SPDX-License-Identifier: Apache-2.0
"""Which call of a model encodes which kind of media."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtprune.adapters.base import Adapter
from vtprune.callers import PerThread
from vtprune.graphs import in_graphs
from vtprune.stages.static_cache import stays_as_it_is


@dataclass
class _Noted:
    """What one thread called the base model with."""

    videos: Tensor | None = None
    """Pixels of videos."""


class EncodeKinds:
    """The encode calls of a model, and the kind of what each of them encodes.

    Some models encode videos by the call for images. Then a call is one of videos if it is given the pixels that the
    base model was called with as those of videos.
    """

    def __init__(self, adapter: Adapter):
        self.adapter = adapter
        kinds = [*adapter.visual_token_ids]
        self.calls: dict[tuple[nn.Module, str], str] = {adapter.encode_call(kind): kind for kind in reversed(kinds)}
        """Module and name of its method -> the (first) kind."""
        self._shares = len(self.calls) < len(kinds)
        self._noted = PerThread(_Noted)

    def install(self) -> Iterator[RemovableHandle]:
        """Yields what takes each hook off again, as soon as it is on."""
        if self._shares:
            yield self.adapter.base.register_forward_pre_hook(self._note, with_kwargs=True)

    @in_graphs(stays_as_it_is)
    def _note(self, module, args, kwargs):
        self._noted().videos = self.adapter.pixel_argument("video", kwargs)

    def of(self, kind: str, arguments: Mapping[str, Any]) -> str:
        """The kind of what a call encodes whose (first) kind is given."""
        videos = self._noted().videos if self._shares else None
        return "video" if videos is not None and any(value is videos for value in arguments.values()) else kind

    def forget(self) -> None:
        """Forget what was noted, in every thread."""
        self._noted.clear()
