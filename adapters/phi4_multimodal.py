# SPDX-License-Identifier: Apache-2.0
"""Phi-4-multimodal: a mosaic of crops and the whole view, written into the prompt by the language model itself."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtprune.adapters.base import Adapter
from vtprune.tokens import Grid, Medium

_ARGUMENTS = ("image_pixel_values", "image_sizes", "image_attention_mask")
_AUDIO = ("audio_input_features", "audio_embed_sizes", "audio_attention_mask")


class Phi4Multimodal(Adapter):
    """`Phi4MultimodalForCausalLM` (arXiv 2503.01743).

    Tokens of an image: the mosaic of its crops, row by row across crops, without the padding; then a separator; then
    the whole view. Each token is the mean of 2x2 patches. A newline token ends each row of both; the separator between
    them goes with the first token that goes. The language model embeds the prompt, encodes images and writes them into
    it all by itself, so that is done ahead for it. It projects queries, keys and values together. Sounds may be in the
    prompt, too.
    """

    model_types: ClassVar[tuple[str, ...]] = ("phi4_multimodal",)
    family = "Phi-4-multimodal"
    layout = "mosaic of crops, whole view, a newline token a row"
    merges_in_encoder = False
    layers_unread = "whether its attention is causal depends on the padding and on the back end"
    features_unread = "its projector is called image by image"

    @property
    def visual_token_ids(self) -> Mapping[str, int]:
        return {"image": self.config.vision_config.image_token_id}

    @property
    def marker_token_ids(self) -> tuple[int, ...]:
        return (self.config.audio_config.audio_token_id,)

    @property
    def _embedding(self) -> Any:
        return self.base.embed_tokens_extend

    @property
    def vision_config(self) -> Any:
        config = copy.copy(self.config.vision_config)
        config.vision_use_head = True
        return config

    def vision_tower(self, kind: str = "image") -> nn.Module:
        return self._embedding.image_embed.img_processor

    @property
    def feature_layers(self) -> list[int]:
        depth = len(self.encoder_layers())
        return [self.config.vision_config.feature_layer % (depth + 1) - 1]

    def pixel_argument(self, kind: str, inputs: Mapping[str, Any]) -> Tensor | None:
        ids, pixels = inputs.get("input_ids"), inputs.get("image_pixel_values")
        # generate() gives pixels, but no sizes, to every step.
        if kind != "image" or ids is None or inputs.get("image_sizes") is None:
            return None
        return pixels if self.visual_token_ids["image"] in ids else None

    def encode_call(self, kind: str) -> tuple[Any, str]:
        return self, "encode_images"

    def encode_images(
        self, image_pixel_values: Tensor, image_sizes: Tensor, image_attention_mask: Tensor, return_dict: bool = True
    ) -> Any:
        """What the model would write into a prompt, as `pooler_output`: (tokens, dim) an image."""
        inputs = dict(zip(_ARGUMENTS, (image_pixel_values, image_sizes, image_attention_mask), strict=True))
        lengths = [len(medium) for medium in self.media("image", inputs, ())]
        weight = self.base.embed_tokens.weight
        # A prompt of nothing but placeholders.
        ids = torch.full((1, sum(lengths)), self.visual_token_ids["image"], device=weight.device)
        written = self._embedding.image_embed(ids, weight.new_zeros(*ids.shape, weight.shape[1]), **inputs)
        return SimpleNamespace(pooler_output=written[0].split(lengths))

    def embedded(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        ids = kwargs.get("input_ids")
        if ids is None:
            return kwargs
        embeddings = self.base.embed_tokens(ids)
        pixels = self.pixel_argument("image", kwargs)
        if pixels is not None:
            output = self.encode_images(**{name: kwargs[name] for name in _ARGUMENTS})
            places = (ids == self.visual_token_ids["image"]).nonzero(as_tuple=True)
            embeddings = embeddings.index_put(places, torch.cat(list(output.pooler_output)).to(embeddings))
        sound = {name: kwargs.get(name) for name in _AUDIO}
        if sound["audio_input_features"] is not None and bool((ids == self.marker_token_ids[0]).any()):
            mode = "speech" if kwargs.get("image_pixel_values") is None else "vision"
            embeddings = self._embedding.audio_embed(ids, embeddings, **sound, audio_projection_mode=mode)
        done = {name: None for name in (*_ARGUMENTS, *_AUDIO) if name in kwargs}
        return {**kwargs, **done, "input_ids": None, "inputs_embeds": embeddings}

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> list[int]:
        crops = inputs["image_pixel_values"].flatten(0, 1)
        return [(crops.shape[-2] // self._patch) * (crops.shape[-1] // self._patch)] * len(crops)

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        config = self.config.vision_config
        patches = config.image_size // config.patch_size
        side = (patches + 1) // 2
        found = []
        for size, mask in zip(inputs["image_sizes"].view(-1, 2), inputs["image_attention_mask"], strict=True):
            down, across = (size // config.crop_size).tolist()
            crops = mask[1 : 1 + down * across, ::2, ::2].reshape(down, across, side, side)
            real = crops.transpose(1, 2).reshape(down * side, across * side)
            mosaic = Grid(int(real[:, 0].sum()), int(real[0].sum()))
            found.append(_views(mosaic, Grid(side, side)))
        return found

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        sizes = inputs["image_sizes"].view(-1, 2) // self.config.vision_config.crop_size
        counts = (1 + sizes.prod(1)).tolist()
        return [image[:count] for image, count in zip(inputs["image_pixel_values"], counts, strict=True)]


def _views(mosaic: Grid, whole: Grid) -> Medium:
    """A mosaic and a whole view, with a newline behind each row, and a separator between them."""

    def rows(crop: int, grid: Grid) -> Tensor:
        crops = torch.full((grid.rows, grid.cols + 1), crop)
        crops[:, -1] = -1
        return crops.flatten()

    crops = torch.cat([rows(0, mosaic), torch.tensor([-1]), rows(1, whole)])
    separator = crops < 0
    lines = separator.cumsum(0) - separator.long()
    return Medium(crops, (mosaic, whole), lines)
