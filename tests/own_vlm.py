# SPDX-License-Identifier: Apache-2.0
"""A model that no adapter of the library is for, as somebody may have one: that of the example in CONTRIBUTING.md."""

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

IMAGE = 31


class OwnVlmConfig(VipLlavaConfig):
    model_type = "own_vlm"


class OwnVlm(VipLlavaForConditionalGeneration):
    config_class = OwnVlmConfig


def tiny_own_vlm(feature_layers: tuple[int, ...] = (-2, -3)) -> OwnVlm:
    """16 tokens an image of 32x32 pixels; the same call gives the same weights."""
    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2)
    config = OwnVlmConfig(
        vision_config=CLIPVisionConfig(**small, image_size=32, patch_size=8),
        text_config=LlamaConfig(**small, vocab_size=32, pad_token_id=0, eos_token_id=None),
        image_token_index=IMAGE,
        vision_feature_layers=list(feature_layers),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OwnVlm(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def two_prompts() -> tuple[OwnVlm, dict[str, Tensor]]:
    """A model, and inputs for it."""
    ids = torch.tensor([[0, 0, 1, 4, *[IMAGE] * 16, 5, 6], [1, 8, 9, 4, *[IMAGE] * 16, 5, 6]])
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return tiny_own_vlm(), {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}
