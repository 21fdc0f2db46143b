# SPDX-License-Identifier: Apache-2.0
"""A tiny model of Nemotron Omni."""

from __future__ import annotations

import torch
import transformers as hf

from vtprune.testing.configs import TEXT, WIDTH
from vtprune.testing.media import END, GRIDS, IMAGE, MERGE, PATCH, START, VIDEO, Item, Layout, flat, noise
from vtprune.testing.tiny.family import Family

_LAYERS = ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe", "mlp", "full_attention"]
_MAMBA = dict(ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=16, n_groups=2, chunk_size=16)
_EXPERTS = dict(
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=24,
    moe_latent_size=16,
)


def _lay(model, shape, siblings, generator):
    """One grid. shape: rows and columns of tokens."""
    rows, columns = shape
    grid = (rows * MERGE, columns * MERGE)
    return Item([START, *[IMAGE] * (rows * columns), END], noise(generator, grid[0] * grid[1], 3 * PATCH**2), grid)


def _collate(samples):
    items = flat(samples)
    return {
        "pixel_values": torch.cat([item.pixels for item in items]),
        "image_grid_hw": torch.tensor([item.shape for item in items]),
    }


def _config(**text):
    return hf.NemotronH_Omni_Reasoning_V3_Config(
        vision_config=dict(
            model_type="radio",
            hidden_size=WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            mlp_ratio=1.5,
            patch_size=PATCH,
            image_size=8 * PATCH,
            max_img_size=16 * PATCH,
            num_registers=2,
            video_temporal_patch_size=2,
        ),
        text_config=TEXT | _MAMBA | _EXPERTS | dict(layers_block_type=_LAYERS, head_dim=8) | text,
        vision_hidden_size=WIDTH,
        projector_hidden_size=48,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


FAMILIES = {
    "nemotron_h_omni": Family(  # videos have the placeholder of images; its own tests have them
        "NemotronH_Omni_Reasoning_V3",
        _config,
        {"image": Layout(GRIDS, _lay, _collate)},
        carries_state=True,
        kindred=True,
    ),
}
