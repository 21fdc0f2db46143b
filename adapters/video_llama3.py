# SPDX-License-Identifier: Apache-2.0
"""VideoLLaMA 3: images and videos of any size, of which the processor leaves out what does not move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtprune.adapters.qwen_vl import Qwen2VL, patch_grids
from vtprune.tokens import Grid, Medium


class VideoLlama3(Qwen2VL):
    """`VideoLlama3ForConditionalGeneration` (arXiv 2501.13106).

    The patches of all media of a call are packed in one sequence, those that become one token next to one another. The
    call says for each medium how many these are in a row: 1 for images, 2 for videos as a rule. Tokens of an image: one
    grid in raster order. Tokens of a video: one grid a frame, with text between them ("Time 1.0s:"). Tokens of a frame
    that are like those of the frame before are encoded, but left out of the prompt (`video_compression_mask`). No CLS
    token, and positions have one axis.
    """

    model_types: ClassVar[tuple[str, ...]] = ("video_llama_3",)
    family = "VideoLLaMA 3"
    layout = "one grid an image or frame, without what does not move"

    def vision_tower(self, kind: str = "image") -> nn.Module:
        return self.base.vision_model

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_model.encoder.layers

    def encoder_attention(self, layer: Any) -> nn.Module:
        return layer.self_attn

    @property
    def projector(self) -> nn.Module:
        return self.base.projector

    def markers(self, ids: Tensor | None, images: Tensor) -> Tensor:
        # All time stamps but the first are inside their video. Those inside show how one begins.
        found = super().markers(ids, images)
        if ids is None:
            return found
        for row, media in enumerate(images):
            tokens = ids[row].tolist()
            for number in media[(ids[row].to(media.device) == self.config.video_token_id) & (media >= 0)].unique():
                columns = (media == number).nonzero().flatten()
                gaps = (columns.diff() > 1).nonzero().flatten().tolist()
                if not gaps:
                    continue
                start, end, following = (int(columns[place]) for place in (0, gaps[0], gaps[0] + 1))
                # Inside come a comma and a stamp.
                near = range(max(start - (following - end - 1), 0), start)
                if begins := [column for column in near if tokens[column] == tokens[end + 2]]:
                    found[row, begins[-1] : start] = True
        return found

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        return [
            Medium.of_grids(*[Grid(rows // side, columns // side)] * frames)
            for (frames, rows, columns), side in zip(
                patch_grids(kind, inputs).tolist(), _sides(kind, inputs), strict=True
            )
        ]

    def prompt_tokens(self, kind: str, inputs: Mapping[str, Any]) -> Tensor | None:
        mask = inputs.get("video_compression_mask") if kind == "video" else None
        return None if mask is None or bool(mask.all()) else mask.bool()

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        media = values.flatten(0, 1).split(patch_grids(kind, inputs).prod(1).tolist())
        sides = _sides(kind, inputs)
        return torch.cat([own.unflatten(0, (-1, side**2)).mean(1) for own, side in zip(media, sides, strict=True)])

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        return features


def _sides(kind: str, inputs: Mapping[str, Any]) -> list[int]:
    """Patches in a row of what becomes one token, for each medium of an encode call."""
    return torch.as_tensor(inputs[f"{kind}_merge_sizes"]).tolist()
