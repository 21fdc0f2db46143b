# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: images and videos of any size, with 2x2 patches merged before the LLM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtprune.adapters.base import PIXELS, Adapter
from vtprune.tokens import Grid, Medium
from vtprune.transformers_private import qwen2_5_vl_window_order


class Qwen2VL(Adapter):
    """`Qwen2VLForConditionalGeneration` (arXiv 2409.12191).

    The patches of all media of a call are packed in one sequence. Four neighbours are next to one another in it, and
    the merger makes one token of them. Tokens of an image: one grid in raster order, with half the rows and columns of
    the patches. Tokens of a video: one such grid for every two frames, one after another. No CLS token. Positions have
    three axes (M-RoPE).
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    family = "Qwen2-VL"
    kinds: ClassVar[tuple[str, ...]] = ("image", "video")
    merges_in_encoder = False
    layout = "one grid an image or two frames"

    def vision_tower(self, kind: str = "image") -> nn.Module:
        return self.base.visual

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.visual.blocks

    def encoder_attention(self, layer: Any) -> nn.Module:
        return layer.attn

    @property
    def projector(self) -> nn.Module:
        return self.base.visual.merger

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> list[int]:
        # Attention does not cross frames.
        return [rows * columns for frames, rows, columns in patch_grids(kind, inputs).tolist() for _ in range(frames)]

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        side = self.vision_config.spatial_merge_size
        return [
            Medium.of_grids(*[Grid(rows // side, columns // side)] * frames)
            for frames, rows, columns in patch_grids(kind, inputs).tolist()
        ]

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        return inputs[PIXELS[kind]].split(patch_grids(kind, inputs).prod(1).tolist())

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        return self.projector_inputs(kind, inputs, values.flatten(0, 1))

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        return features.unflatten(0, (-1, self.vision_config.spatial_merge_size**2)).mean(1)


class Qwen2_5_VL(Qwen2VL):
    """`Qwen2_5_VLForConditionalGeneration` (arXiv 2502.13923).

    Like Qwen2-VL, but most encoder layers attend within windows. The encoder sorts the merged tokens by windows, and
    puts them back in raster order after the merger.
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)
    family = "Qwen2.5-VL"
    gated_encoder_mlp = True

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        order = qwen2_5_vl_window_order(patch_grids(kind, inputs), self.vision_config)
        return super().projector_inputs(kind, inputs, features)[order.argsort().to(features.device)]


class Qwen3VL(Qwen2VL):
    """`Qwen3VLForConditionalGeneration` and `Qwen3VLMoeForConditionalGeneration` (arXiv 2511.21631).

    Like Qwen2-VL, but text with a time stamp ("<0.3 seconds>") comes before each grid of a video, and features of
    earlier encoder layers are added to the visual tokens after the first decoder layers (DeepStack).
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl", "qwen3_vl_moe")
    family = "Qwen3-VL"

    def markers(self, ids: Tensor | None, images: Tensor) -> Tensor:
        # All time stamps but the first are inside their video. The first one is found if the prompt has "vision start"
        # before the whole video, too, as chat templates do, or if the stamps inside show how a stamp begins.
        found = super().markers(ids, images)
        if ids is None:
            return found
        ids = ids.to(images.device)
        for row, media in enumerate(images):
            videos = media[(ids[row] == self.config.video_token_id) & (media >= 0)].unique().tolist()
            tokens, numbers = ids[row].tolist(), media.tolist()
            for start in (numbers.index(video) - 1 for video in videos):
                found[row, self._first_stamp(tokens, numbers, start) : start] = True
        return found

    def _first_stamp(self, tokens: list[int], numbers: list[int], start: int) -> int:
        """The column where the first time stamp of a video begins; `start` if it is not found.

        tokens: the ids of a sample. numbers: the medium of each column, -1 for none. start: the column of the video's
        "vision start", which follows the stamp.
        """
        config, video = self.config, numbers[start + 1]
        for column in range(start - 1, -1, -1):
            if tokens[column] == config.vision_start_token_id:
                return column
            if tokens[column] == config.vision_end_token_id or numbers[column] >= 0:
                break
        inside = next((c for c in range(start + 1, len(numbers)) if numbers[c] != video), len(numbers))
        if video not in numbers[inside:]:
            return start
        # Inside the video come "vision end", a stamp at least as long as the first one, and "vision start".
        opening, length = tokens[inside + 1], numbers.index(video, inside) - inside - 2
        near = [column for column in range(max(start - length, 0), start) if tokens[column] == opening]
        return near[-1] if near else start


class Qwen3_5(Qwen3VL):
    """`Qwen3_5ForConditionalGeneration` and `Qwen3_5MoeForConditionalGeneration` (Qwen3.5; no paper).

    Like Qwen3-VL, without DeepStack. Most layers of the language model are linear attention, whose state every token
    changes, so tokens can be dropped before the language model only.
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_5", "qwen3_5_moe")
    family = "Qwen3.5"
    carries_state = True


class Qwen4Exp(Qwen3_5):
    """`Qwen4ExpForConditionalGeneration` (Qwen4-Exp; no paper).

    Like Qwen3.5. The other layers of the language model attend to a few blocks of columns, which they look up in an
    index, and some layers add embeddings of runs of token ids. Of a prompt with tokens missing, blocks and runs are
    those of the tokens that are there.
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen4_exp",)
    family = "Qwen4-Exp"


def patch_grids(kind: str, inputs: Mapping[str, Any]) -> torch.Tensor:
    """(media, 3) long: temporal patches, rows and columns of patches of each medium of a call."""
    return torch.as_tensor(inputs[f"{kind}_grid_thw"])
