# SPDX-License-Identifier: Apache-2.0
"""Molmo 2: a whole view and a mosaic of overlapping crops, pooled, whose tokens all attend to one another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from vtprune.adapters.base import PIXELS, Adapter
from vtprune.tokens import Grid, Medium


class Molmo2(Adapter):
    """`Molmo2ForConditionalGeneration` (Molmo 2; Molmo is arXiv 2409.17146).

    Tokens of an image: the whole view in raster order, then one grid over the mosaic of all crops. Each token pools a
    few neighbouring patches by attention; the processor says which, and leaves patches out where crops overlap. Column
    tokens, which are text, end the rows, and others begin and end both views. Tokens of a video: one grid a frame, with
    a time stamp before each; the first stamp counts as a word of the prompt. Features are added to the placeholder's
    embedding. All tokens of images, of a sample and with what stands around them, attend to one another in both
    directions. No CLS token. Rotary embeddings of some layers may be unscaled. A call takes images or videos, not both.
    """

    model_types: ClassVar[tuple[str, ...]] = ("molmo2",)
    family = "Molmo 2"
    kinds = ("image", "video")
    layout = "whole view and mosaic of an image, or one grid a frame"
    marker_columns = (1, 1)  # the start of a view or frame; a column token, or the end

    @property
    def marker_token_ids(self) -> tuple[int, ...]:
        starts = (self.config.image_start_token_id, self.config.low_res_image_start_token_id)
        frame = (self.config.frame_start_token_id, self.config.frame_end_token_id)
        return (*starts, self.config.image_end_token_id, *frame)

    def blocks(self, inputs: Mapping[str, Any]) -> Tensor | None:
        types = inputs.get("mm_token_type_ids")
        return None if types is None else torch.where(types == 1, 0, -1)

    @property
    def rope_kinds(self) -> Sequence[Any]:
        return self.language_model.rope_types

    def rope(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        decoder = self.language_model
        scaled = self.rope_kinds[layer] == "scaled"
        return (decoder.rotary_emb if scaled else decoder.rotary_emb_unscaled)(hidden, positions)

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_tower.layers

    @property
    def feature_layers(self) -> list[int]:
        return [layer % len(self.encoder_layers()) for layer in self.config.adapter_config.vision_feature_layer]

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> list[int]:
        crops = inputs[PIXELS[kind]].flatten(0, -3)
        return [crops.shape[1]] * len(crops)

    @torch.no_grad()
    def features_of(self, output: Any) -> Sequence[Tensor]:
        ids = torch.tensor(self.config.image_patch_id, device=output.pooler_output[0].device)
        placeholder = self.base.get_input_embeddings()(ids)
        return [placeholder + features for features in output.pooler_output]

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        found = []
        for grid in inputs[f"{kind}_grids"].tolist():
            if kind == "video":
                frames, rows, columns = grid
                found.append(Medium.of_grids(*[Grid(rows, columns)] * frames))
            else:
                views = [Grid(*grid[:2]), Grid(*grid[2:])]
                found.append(Medium.of_grids(*filter(len, views)))
        return found

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        crops = inputs[PIXELS[kind]].flatten(0, -3)
        pooled = inputs[f"{kind}_token_pooling"]
        pooled = pooled[(pooled >= 0).any(1)]
        lengths = [len(medium) for medium in self.media(kind, inputs, ())]
        # The crops of an image follow one another, and so do its tokens.
        for tokens in pooled.split(lengths):
            first, last = (int(place) // crops.shape[1] for place in (tokens[tokens >= 0].min(), tokens.max()))
            yield crops[first : last + 1]

    def pictures(self, kind: str, inputs: Mapping[str, Any]) -> Sequence[Sequence[Tensor]]:
        patches = inputs[PIXELS[kind]].flatten(0, -2)
        pooled = inputs[f"{kind}_token_pooling"].to(patches.device)
        pooled = pooled[(pooled >= 0).any(1)]
        there = (pooled >= 0)[..., None]
        squares = patches[pooled.clamp(min=0)] * there
        # A token at the edge may pool fewer patches. Those that lack look like the others on average.
        squares = torch.where(there, squares, squares.sum(1, keepdim=True) / there.sum(1, keepdim=True))
        pattern = "(r c) (i j) (p q ch) -> ch (r i p) (c j q)"
        sizes = {"i": math.isqrt(pooled.shape[1]), "p": self._patch, "q": self._patch}
        grids = [[*filter(None, medium.grids)] for medium in self.media(kind, inputs, ())]
        views = iter(squares.split([len(grid) for own in grids for grid in own]))
        return [[rearrange(next(views), pattern, r=grid.rows, **sizes) for grid in own] for own in grids]

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        return self.projector_inputs(kind, inputs, values)

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        patches = features.reshape(-1, features.shape[-1])
        pooled = inputs[f"{kind}_token_pooling"].to(patches.device)
        there = pooled >= 0
        pooled, there = pooled[there.any(1)], there[there.any(1)]
        total = (patches[pooled.clamp(min=0)] * there[..., None]).sum(1)
        return total / there.sum(1, keepdim=True)
