# SPDX-License-Identifier: Apache-2.0
"""GOT-OCR 2.0 and PP-Chart2Table: a SAM encoder, whose patches convolutions make fewer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from vtprune.adapters.base import Adapter
from vtprune.adapters.internvl import square
from vtprune.tokens import Medium


class GotOcr2(Adapter):
    """`GotOcr2ForConditionalGeneration` (GOT-OCR 2.0, arXiv 2409.01704; PP-Chart2Table, no paper), over Qwen 2.

    The encoder is that of SAM (arXiv 2304.02643): 64x64 patches of an image, layers that attend in windows, without a
    CLS token. Two convolutions in the projector halve the sides, so that a token stands for 4x4 patches, and for some
    around them. Tokens of an image: one grid in raster order. On request the processor cuts an image into tiles,
    followed by a thumbnail; these, and the pages of a text of several pages, have no text between them.
    """

    model_types: ClassVar[tuple[str, ...]] = ("got_ocr2", "pp_chart2table")
    family = "GOT-OCR 2.0, PP-Chart2Table"
    layout = "one grid an image or tile, tiles side by side"
    tiles_adjoin = True
    marker_columns = (1, 1)  # <img>, </img>
    merges_in_encoder = False
    layers_unread = "it is a SAM, whose layers attend in windows by code of their own"
    encoder_uncounted = "it is a SAM, whose layers attend in windows, with convolutions behind them"

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_tower.layers

    def encoder_attention(self, layer: Any) -> nn.Module:
        return layer.attn

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        return [Medium.of_grids(square(len(tile))) for tile in features]

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        return avg_pool2d(features, 4).flatten(2).mT.flatten(0, 1)
