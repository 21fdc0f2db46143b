# SPDX-License-Identifier: Apache-2.0
"""The thinkers of Qwen2.5-Omni and Qwen3-Omni: images and videos as in Qwen-VL, and audio, which is left as it is."""

from __future__ import annotations

from typing import ClassVar

from vtprune.adapters.qwen_vl import Qwen2_5_VL, Qwen2VL


class Qwen2_5Omni(Qwen2_5_VL):
    """`Qwen2_5OmniThinkerForConditionalGeneration`, alone or in a `Qwen2_5OmniForConditionalGeneration` (arXiv
    2503.20215).

    Like Qwen2.5-VL. Audio tokens are neither visual nor text: they are never dropped, and methods that read the
    question do not read them. The audio of a video stands between the tokens of its frames (`use_audio_in_video`).
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_omni_thinker", "qwen2_5_omni")
    family = "Qwen2.5-Omni"


class Qwen3Omni(Qwen2VL):
    """`Qwen3OmniMoeThinkerForConditionalGeneration`, alone or in a `Qwen3OmniMoeForConditionalGeneration` (arXiv
    2509.17765).

    Like Qwen3-VL with experts and DeepStack, but without time stamps in a video. Audio as in Qwen2.5-Omni.
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_omni_moe_thinker", "qwen3_omni_moe")
    family = "Qwen3-Omni"
