# SPDX-License-Identifier: Apache-2.0
"""Cohere Compass: the layout of Qwen3-VL over layers of Cohere 2."""

from __future__ import annotations

from typing import ClassVar

from vtprune.adapters.qwen_vl import Qwen3VL


class CohereCompass(Qwen3VL):
    """`CohereCompassForConditionalGeneration` (North Micro Vision; no paper).

    Like Qwen3-VL, with its time stamps and DeepStack. Each kind of decoder layer is rotated in its own way, on three
    axes (M-RoPE), or not at all.
    """

    model_types: ClassVar[tuple[str, ...]] = ("cohere_compass",)
    family = "Cohere Compass"
