# SPDX-License-Identifier: Apache-2.0
"""Tiny random-weight LLaVA models and batches of raw ids and pixels; no processor, no checkpoint."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from vtprune.testing import configs
from vtprune.testing.configs import INIT_STD
from vtprune.testing.media import BOS, PAD

IMAGE_TOKEN, VOCABULARY = 120, 121

_VISION = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, initializer_range=INIT_STD)
TEXT = configs.TEXT | dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, initializer_range=INIT_STD)


def _config(name: str) -> LlavaConfig:
    if name == "mha":  # multi-head attention below a CLIP encoder, 36 visual tokens
        return LlavaConfig(
            vision_config=CLIPVisionConfig(**_VISION, num_hidden_layers=5, image_size=42, patch_size=7),
            text_config=LlamaConfig(**TEXT | dict(num_key_value_heads=4)),
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    if name == "gqa":  # grouped-query attention with its own head width, several feature layers, 25 visual tokens
        return LlavaConfig(
            vision_config=CLIPVisionConfig(**_VISION, num_hidden_layers=6, image_size=40, patch_size=8),
            text_config=LlamaConfig(**TEXT | dict(num_hidden_layers=6, head_dim=24)),
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=[-3, -2],
            vision_feature_select_strategy="default",
        )
    if name == "siglip":  # no CLS token; biases on q, k and v; 16 visual tokens
        return LlavaConfig(
            vision_config=SiglipVisionConfig(
                **_VISION, num_hidden_layers=4, image_size=32, patch_size=8, vision_use_head=False
            ),
            text_config=Qwen2Config(**TEXT | dict(num_hidden_layers=6)),
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    raise KeyError(name)


def build(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """A freshly built model; the same name gives the same weights."""
    return _initialised(_config(name), attention, seed=sum(map(ord, name))).to(dtype)


def with_text_tower(text_config, attention: str = "sdpa") -> LlavaForConditionalGeneration:
    """A model with a language model of any kind below a CLIP encoder, 16 visual tokens."""
    vision = CLIPVisionConfig(**_VISION, num_hidden_layers=4, image_size=32, patch_size=8)
    return _initialised(
        LlavaConfig(vision_config=vision, text_config=text_config, image_token_index=IMAGE_TOKEN), attention, seed=0
    )


def _initialised(config: LlavaConfig, attention: str, seed: int) -> LlavaForConditionalGeneration:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
        # Some modules are initialised by fixed rules or to zero (biases): the range above does not reach them.
        for parameter_name, parameter in model.named_parameters():
            if "norm" not in parameter_name:
                torch.nn.init.normal_(parameter, std=INIT_STD)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


@functools.cache
def shared(name: str, attention: str = "sdpa") -> LlavaForConditionalGeneration:
    """The model that tests share; whoever uses it has to leave it as it was."""
    return build(name, attention)


def tokens_per_image(model: LlavaForConditionalGeneration) -> int:
    vision = model.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts, each with its own images."""

    ids: tuple[Tensor, ...]
    """one (tokens,) each, without padding"""
    images: tuple[Tensor, ...]
    """one (images, 3, height, width) each"""

    def __len__(self) -> int:
        return len(self.ids)

    def one(self, sample: int) -> Prompts:
        return Prompts((self.ids[sample],), (self.images[sample],))

    def pads(self) -> list[int]:
        longest = max(map(len, self.ids))
        return [longest - len(ids) for ids in self.ids]

    def inputs(self, padding_side: str = "left") -> dict[str, Tensor]:
        """What a processor would hand to the model."""
        rows, masks = [], []
        for ids, pads in zip(self.ids, self.pads(), strict=True):
            padding, real = ids.new_full((pads,), PAD), torch.ones_like(ids)
            order = slice(None) if padding_side == "left" else slice(None, None, -1)
            rows.append(torch.cat([padding, ids][order]))
            masks.append(torch.cat([torch.zeros_like(padding), real][order]))
        inputs = {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}
        pixels = torch.cat(self.images)
        return inputs | ({"pixel_values": pixels} if len(pixels) else {})

    def first_column(self, sample: int, padding_side: str = "left") -> int:
        """Column of `input_ids` that holds the sample's first real token."""
        return self.pads()[sample] if padding_side == "left" else 0


def prompts(model: LlavaForConditionalGeneration, *layouts: str, seed: int = 0) -> Prompts:
    """One prompt a layout: `t` is a text token, `I` an image, e.g. "ttIttt"; each begins with BOS."""
    generator = torch.Generator().manual_seed(seed)
    ids, images = [], []
    for layout in layouts:
        parts = [torch.tensor([BOS])]
        for letter in layout:
            if letter == "I":
                parts.append(torch.full((tokens_per_image(model),), IMAGE_TOKEN))
            else:
                parts.append(torch.randint(2, IMAGE_TOKEN, (1,), generator=generator))
        ids.append(torch.cat(parts))
        size = model.config.vision_config.image_size
        images.append(torch.randn(layout.count("I"), 3, size, size, generator=generator))
    return Prompts(tuple(ids), tuple(images))


def batch_of_three(model: LlavaForConditionalGeneration) -> Prompts:
    """Different lengths, two images in the second prompt."""
    return prompts(model, "tItttt", "ttIttItttttt", "tttIttttttttt")
