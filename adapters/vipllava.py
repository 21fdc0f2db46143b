# SPDX-License-Identifier: Apache-2.0
"""VipLLaVA: LLaVA-1.5 with features of several encoder layers."""

from __future__ import annotations

from typing import ClassVar

from vtprune.adapters.llava import Llava


class VipLlava(Llava):
    """`VipLlavaForConditionalGeneration` (arXiv 2312.00784) with a CLIP vision tower.

    Like LLaVA-1.5, but the projector reads several encoder layers side by side, and always without the CLS token.
    """

    model_types: ClassVar[tuple[str, ...]] = ("vipllava",)
    family = "VipLLaVA"
    cls_token = "yes"
    towers = {"clip_vision_model": 1}

    def cuts_cls(self, kind: str) -> bool:
        return True
