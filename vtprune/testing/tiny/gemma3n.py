# SPDX-License-Identifier: Apache-2.0
"""A tiny model of Gemma 3n."""

from __future__ import annotations

from typing import Any

import transformers as hf

from vtprune.testing.configs import TEXT
from vtprune.testing.media import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    END,
    IMAGE,
    NEWLINE,
    START,
    VOCABULARY,
    Item,
    Layout,
    noise,
    stack,
)
from vtprune.testing.tiny.family import Family
from vtprune.testing.tiny.gemma4 import scale_queries

SIDE = 6
"""Rows and columns of visual tokens of an image."""
_KINDS = ["sliding_attention", "sliding_attention", "full_attention"]


SOUND = 6
"""Tokens of a sound."""


def _stages() -> list[list[dict[str, Any]]]:
    """Blocks of each of MobileNetV5's stages, which halve rows and columns, as timm takes them."""
    common = dict(act_layer=None, out_chs=16)
    first = common | dict(block_type="er", stride=2, exp_ratio=2.0, exp_kernel_size=3)
    convolution = common | dict(block_type="uir", stride=2, exp_ratio=2.0, dw_kernel_size_start=3, dw_kernel_size_mid=5)
    attention = common | dict(block_type="mqa", stride=1, num_heads=2, key_dim=8, value_dim=8)
    last = [convolution.copy(), attention, convolution | dict(stride=1)]
    return [[first], [convolution], [convolution.copy()], last]


def _mend(model) -> None:
    scale_queries(model)
    # timm takes the fields of blocks away while it reads them.
    model.model.vision_tower.config.model_args["block_args"] = _stages()


def _config(**text):
    vision = dict(
        architecture="mobilenetv5_300m_enc",
        model_args=dict(block_args=_stages(), stem_size=8, msfa_indices=(-2, -1), msfa_output_resolution=(SIDE, SIDE)),
        hidden_size=2048,  # of all that timm builds
        vocab_offset=IMAGE,
        vocab_size=AUDIO - IMAGE,
    )
    sound = dict(
        hidden_size=16,
        input_feat_size=16,
        conf_num_hidden_layers=1,
        conf_num_attention_heads=2,
        sscp_conv_channel_size=(4, 2),
        vocab_offset=AUDIO,
        vocab_size=VOCABULARY - AUDIO,
    )
    fields = dict(
        head_dim=8,
        sliding_window=512,
        layer_types=[*_KINDS, *_KINDS, "sliding_attention", "full_attention"],
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=IMAGE,
        hidden_size_per_layer_input=8,
        altup_num_inputs=3,
        laurel_rank=4,
        intermediate_size=[48, 48, 48, 48, 48, 48, 64, 64],
        activation_sparsity_pattern=[0.5] * 3 + [0.0] * 5,
        final_logit_softcapping=8.0,
    )
    return hf.Gemma3nConfig(
        vision_config=hf.Gemma3nVisionConfig(**vision),
        audio_config=hf.Gemma3nAudioConfig(**sound),
        text_config=hf.Gemma3nTextConfig(**TEXT | fields | text),
        vision_soft_tokens_per_image=SIDE**2,
        audio_soft_tokens_per_image=SOUND,
        boi_token_id=START,
        eoi_token_id=END,
        image_token_id=IMAGE,
        boa_token_id=AUDIO_START,
        eoa_token_id=AUDIO_END,
        audio_token_id=AUDIO,
    )


def _lay(model, side, siblings, generator):
    """An image between its markers, and blank lines around these."""
    return Item([NEWLINE, START, *[IMAGE] * side**2, END, NEWLINE], noise(generator, 3, 16 * side, 16 * side))


FAMILIES = {
    "gemma3n": Family(
        "Gemma3nForConditionalGeneration",
        _config,
        {"image": Layout((SIDE,) * 4, _lay, stack("pixel_values"))},
        package="timm",
        mend=_mend,
    ),
}
