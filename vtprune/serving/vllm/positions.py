# SPDX-License-Identifier: Apache-2.0
"""Positions of models that have three of them a token (M-RoPE): compact, as a session renumbers them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtprune.serving.plan import Plan
from vtprune.serving.vllm.fields import field

if TYPE_CHECKING:
    from vllm.model_executor.models.interfaces import SupportsMRoPE as Base
else:
    Base = object


class RanksPositions(Base):
    """Mixin in front of a model class of vLLM with M-RoPE.

    Where an image or video of a prompt lost tokens, a token's position is its rank, on all axes. That is known before
    anything is encoded.
    """

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        if any(_prunes(feature) for feature in mm_features):
            return torch.arange(len(input_tokens)).expand(3, -1).clone(), 0
        return super().get_mrope_input_positions(input_tokens, mm_features)


def _prunes(feature: Any) -> bool:
    packed = None if feature.data is None else feature.data.get(field(feature.modality))
    return packed is not None and Plan.unpack(packed.data).prunes
