# SPDX-License-Identifier: Apache-2.0
"""Mistral Small 3.1 and later, Mistral Large 4, LightOnOCR: the tower of Pixtral, with 2x2 patches merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from vtprune.adapters.pixtral import Pixtral
from vtprune.tokens import Grid, Medium


class Mistral3(Pixtral):
    """`Mistral3ForConditionalGeneration` (Mistral Small 3.1, 3.2 and 4; no paper).

    Like Pixtral-12B, but the projector merges neighbouring patches, `spatial_merge_size` in each direction, into one
    token. Rows and columns that do not fill a merge are cut off.
    """

    model_types: ClassVar[tuple[str, ...]] = ("mistral3",)
    family = "Mistral 3"

    @classmethod
    def refuses(cls, config: Any) -> str | None:
        return None

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        side = self.config.spatial_merge_size
        return [Medium.of_grids(Grid(grid.rows // side, grid.cols // side)) for grid in self.patch_grids(inputs)]

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        return self.projector_inputs(kind, inputs, values.flatten(0, 1))

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        grids = self.patch_grids(inputs)
        means = [
            avg_pool2d(patches.T.unflatten(1, (grid.rows, grid.cols)), self.config.spatial_merge_size).flatten(1).T
            for patches, grid in zip(features.split([len(grid) for grid in grids]), grids, strict=True)
        ]
        return torch.cat(means)


class LightOnOcr(Mistral3):
    """`LightOnOcrForConditionalGeneration` (arXiv 2601.14251), over Qwen 3.

    Like Mistral 3, but without text tokens between the rows.
    """

    model_types: ClassVar[tuple[str, ...]] = ("lighton_ocr",)
    family = "LightOnOCR"
    layout = "one grid an image"
    marker_columns = (0, 0)

    def vision_tower(self, kind: str = "image") -> Any:
        return self.base.vision_encoder

    @property
    def projector(self) -> Any:
        return self.base.vision_projection


class MistralLarge4(Mistral3):
    """`MistralLarge4ForConditionalGeneration` (Mistral Large 4; no paper).

    Like Mistral 3. The language model looks up in an index which columns a token attends to. Several layers share what
    is found, and may share keys and values, so tokens can be dropped before the language model only.
    """

    model_types: ClassVar[tuple[str, ...]] = ("mistral_large4",)
    family = "Mistral Large 4"
    carries_state = True
