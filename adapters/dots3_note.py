# SPDX-License-Identifier: Apache-2.0
"""Dots 3 Note: images and videos of any size, with 2x2 patches merged before the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from vtprune.adapters.qwen_vl import Qwen2VL


class Dots3Note(Qwen2VL):
    """`Dots3NoteForConditionalGeneration` (dots 3 note; no paper).

    Like Qwen2-VL, but every frame of a video has a grid of its own, and positions have one axis. Some layers of the
    encoder are mixtures of experts. Some layers of the language model look up in an index which columns a token attends
    to, so tokens can be dropped before the language model only. Audio is left as it is.
    """

    model_types: ClassVar[tuple[str, ...]] = ("dots3_note",)
    family = "dots 3 note"
    layout = "one grid an image or frame"
    gated_encoder_mlp = True
    carries_state = True
    marker_columns = (1, 1)  # what chat templates put around images and videos

    def vision_tower(self, kind: str = "image") -> nn.Module:
        return self.base.vision_tower

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_tower.blocks

    @property
    def projector(self) -> Any:
        return self.base.vision_tower.merger
