# SPDX-License-Identifier: Apache-2.0
"""The DigitScenes-Video model before training: a small LLaVA-OneVision (SigLIP, projector, Qwen2)."""

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from .clips import FRAME_SIZE
from .model import CHAT_TEMPLATE, PATCH_SIZE, VOCABULARY, build_tokenizer

FRAME_GRID = FRAME_SIZE // PATCH_SIZE
TOKEN_GRID = FRAME_GRID // 2
FRAME_TOKENS = TOKEN_GRID * TOKEN_GRID
"""Visual tokens of a frame: its patches are averaged two by two. One newline token ends a video."""

FRAMES = 12
"""Frames that the processor samples uniformly from a clip."""

VIDEO_VOCABULARY = [*VOCABULARY, "<video>", "appears", "last", "moves", "left", "right", "up", "down", "still"]
VIDEO_VOCABULARY += ["when", "seen", "start", "middle", "end", "always"]

VIDEO_CHAT_TEMPLATE = CHAT_TEMPLATE.replace(
    "' <image>' if part['type'] == 'image'", "' <' ~ part['type'] ~ '>' if part['type'] in ('image', 'video')"
)


def build_video_tokenizer() -> PreTrainedTokenizerFast:
    """The image model's tokenizer with more words behind its own."""
    return build_tokenizer(VIDEO_VOCABULARY, ("<image>", "<video>"))


def build_video_processor() -> LlavaOnevisionProcessor:
    """Clips are sampled at `FRAMES` frames of 112 x 112; `<video>` becomes 16 tokens a frame and a newline.

    An image is one tile of 112 x 112 beside its base, `<image>` 64 tokens, 64 more and 8 newlines.
    """
    layout = dict(size={"height": FRAME_SIZE, "width": FRAME_SIZE}, image_mean=[0.3] * 3, image_std=[0.3] * 3)
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(image_grid_pinpoints=[[FRAME_SIZE, FRAME_SIZE]], **layout),
        video_processor=LlavaOnevisionVideoProcessor(num_frames=FRAMES, do_sample_frames=True, **layout),
        tokenizer=build_video_tokenizer(),
        num_image_tokens=FRAME_GRID * FRAME_GRID,
        vision_feature_select_strategy="full",
        chat_template=VIDEO_CHAT_TEMPLATE,
    )


def build_video_model() -> LlavaOnevisionForConditionalGeneration:
    """The architecture with random weights: about 2.1 million parameters."""
    vision = SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=3,
        hidden_act="gelu",
        image_size=FRAME_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    words = {"pad": "<pad>", "bos": "<s>", "eos": "</s>"}
    special = {f"{name}_token_id": VIDEO_VOCABULARY.index(word) for name, word in words.items()}
    text = Qwen2Config(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(VIDEO_VOCABULARY),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **special,
    )
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=VIDEO_VOCABULARY.index("<image>"),
            video_token_index=VIDEO_VOCABULARY.index("<video>"),
            image_grid_pinpoints=[[FRAME_SIZE, FRAME_SIZE]],
            tie_word_embeddings=True,
            **special,
        )
    )
