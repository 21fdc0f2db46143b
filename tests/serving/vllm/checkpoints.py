# SPDX-License-Identifier: Apache-2.0
"""Tiny random-weight checkpoints with their processors, in folders that vLLM and transformers both load.

vLLM's attention on CPUs needs heads of 32 or more, so these are wider than the models of the other tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from conformance import processors
from safetensors.torch import load_file, save_file

from vtprune.testing.media import BOS, END, IMAGE, MERGE, PAD, PATCH, START, TILE, VIDEO, VOCABULARY

WIDTH = 128
TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=None,
    tie_word_embeddings=False,
)
VISION = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
PACKED = dict(
    hidden_size=64,
    intermediate_size=96,
    out_hidden_size=WIDTH,
    patch_size=PATCH,
    spatial_merge_size=MERGE,
    temporal_patch_size=2,
    depth=4,
    num_heads=4,
)
PACKED_IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]


def _mrope(**more) -> dict:
    return {
        "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]} | more,
    }


def _llava():
    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=42, patch_size=7),
        text_config=hf.LlamaConfig(**TEXT, head_dim=32),
        image_token_index=IMAGE,
        image_seq_length=36,
    )


def _llava_next():
    return hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=TILE, patch_size=8),
        text_config=hf.LlamaConfig(**TEXT, head_dim=32),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )


def _llava_onevision():
    return hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=TILE, patch_size=8, vision_use_head=False),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_9",
    )


def _qwen2_vl():
    vision = dict(embed_dim=64, hidden_size=WIDTH, patch_size=PATCH, spatial_merge_size=MERGE, temporal_patch_size=2)
    return hf.Qwen2VLConfig(
        vision_config=vision | dict(depth=4, num_heads=4, mlp_ratio=2),
        text_config=TEXT | _mrope(),
        tie_word_embeddings=False,
        **PACKED_IDS,
    )


def _qwen2_5_vl():
    return hf.Qwen2_5_VLConfig(
        vision_config=PACKED | dict(window_size=16, fullatt_block_indexes=[1, 3], tokens_per_second=2),
        text_config=TEXT | _mrope(),
        tie_word_embeddings=False,
        **PACKED_IDS,
    )


def _qwen3_vl():
    return hf.Qwen3VLConfig(
        vision_config=PACKED | dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1, 2]),
        text_config=TEXT | _mrope(mrope_interleaved=True),
        tie_word_embeddings=False,
        **PACKED_IDS,
    )


def _internvl():
    return hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**VISION, image_size=[TILE] * 2, patch_size=[PATCH] * 2),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=9,
    )


@dataclass(frozen=True)
class Checkpoint:
    """A family's tiny model."""

    class_name: str
    config: Callable
    image: str
    """How a prompt writes an image."""
    video: str = ""
    """How it writes a video; empty if there are none."""
    times: bool = False
    """Whether a video comes with its frame rate."""
    prefixed_tower: bool = False
    """Whether published checkpoints have a prefix in the names of the tower's weights that transformers 5 leaves out
    when it saves, and vLLM asks for."""


_QWEN: dict = dict(
    image="<|vision_start|><|image_pad|><|vision_end|>",
    video="<|vision_start|><|video_pad|><|vision_end|>",
    times=True,
)
CHECKPOINTS = {
    "llava": Checkpoint("LlavaForConditionalGeneration", _llava, "<image>", prefixed_tower=True),
    "llava_onevision": Checkpoint(
        "LlavaOnevisionForConditionalGeneration", _llava_onevision, "<image>", "<video>", prefixed_tower=True
    ),
    "llava_next": Checkpoint("LlavaNextForConditionalGeneration", _llava_next, "<image>", prefixed_tower=True),
    "qwen2_vl": Checkpoint("Qwen2VLForConditionalGeneration", _qwen2_vl, **_QWEN),
    "qwen2_5_vl": Checkpoint("Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl, **_QWEN),
    "qwen3_vl": Checkpoint("Qwen3VLForConditionalGeneration", _qwen3_vl, **_QWEN),
    "internvl": Checkpoint("InternVLForConditionalGeneration", _internvl, "<IMG_CONTEXT>"),
}


def save(name: str, folder: Path) -> Path:
    """The folder of a family's checkpoint, which is written if it is not there."""
    path = folder / name
    if (path / "config.json").exists():
        return path
    checkpoint = CHECKPOINTS[name]
    torch.manual_seed(0)
    model = getattr(hf, checkpoint.class_name)._from_config(checkpoint.config())
    for parameter_name, parameter in model.named_parameters():
        # Wide enough that a wrong choice or position shows in what is generated.
        if parameter.ndim == 1 and parameter_name.endswith(".weight"):
            parameter.data += 0.1 * torch.randn_like(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.12)
    model.generation_config.eos_token_id = None
    model.generation_config.do_sample = False
    model.save_pretrained(path)
    if checkpoint.prefixed_tower:
        weights = load_file(path / "model.safetensors")
        named = {key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in weights.items()}
        save_file(named, path / "model.safetensors", {"format": "pt"})
    processor = processors.processor(name)
    if name.startswith("qwen"):
        processor.image_processor.size = {"shortest_edge": 300, "longest_edge": 4000}
        processor.video_processor.size = {"shortest_edge": 300, "longest_edge": 16000}
        # vLLM normalises images and videos alike, as those of published checkpoints are
        for part in (processor.image_processor, processor.video_processor):
            part.image_mean = part.image_std = [0.5] * 3
    if name == "llava_onevision":  # vLLM takes this ratio, whatever the config says
        processor.vision_aspect_ratio = "anyres_max_9"
        processor.image_processor.image_grid_pinpoints = PINPOINTS
    processor.save_pretrained(path)
    return path
