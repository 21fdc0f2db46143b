# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Perception LM."""

from __future__ import annotations

import transformers as hf

from vtprune.testing.configs import WIDTH, llama
from vtprune.testing.media import IMAGE, MERGE, PATCH, TILE, VIDEO, Item, Layout, noise, stack
from vtprune.testing.tiny.family import Family


def _lay(placeholder: int):
    """Tiles, or frames, side by side. parts: how many."""

    def make(model, parts, siblings, generator):
        tokens = [placeholder] * ((TILE // PATCH // MERGE) ** 2 * parts)
        return Item(tokens, noise(generator, parts, 3, TILE, TILE))

    return make


def _config(**text):
    tower = dict(
        embed_dim=WIDTH,
        num_heads=4,
        depth=4,
        img_size=(TILE, TILE),
        patch_size=PATCH,
        mlp_ratio=1.5,
        global_pool="",
        use_post_transformer_norm=False,
        init_values=0.1,
        ref_feat_shape=(TILE // PATCH,) * 2,
    )
    return hf.PerceptionLMConfig(
        vision_config=hf.TimmWrapperConfig(
            architecture="vit_pe_core_large_patch14_336", model_args=tower, do_pooling=False
        ),
        text_config=llama(**text),
        projector_pooling_ratio=MERGE,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


# As many tiles in every image, and frames in every video, which a batch needs.
_LAYOUTS = {
    "image": Layout((3,) * 4, _lay(IMAGE), stack("pixel_values")),
    "video": Layout((2,) * 4, _lay(VIDEO), stack("pixel_values_videos")),
}

FAMILIES = {
    "perception_lm": Family("PerceptionLMForConditionalGeneration", _config, _LAYOUTS, package="timm", kindred=True)
}
