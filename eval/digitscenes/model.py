# SPDX-License-Identifier: Apache-2.0
"""The DigitScenes model before training: a small LLaVA (CLIP ViT, projector, Llama) with a word-level tokenizer."""

import math
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .scenes import COLOURS, IMAGE_SIZE

PATCH_SIZE = 14
GRID = IMAGE_SIZE // PATCH_SIZE
VISUAL_TOKENS = GRID * GRID

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
WORDS = [
    "user:",
    "assistant:",
    "?",
    "what",
    "digit",
    "is",
    "colour",
    "there",
    "a",
    "how",
    "many",
    "digits",
    "are",
    "which",
]
WORDS += ["larger", "smaller", "or", "leftmost", "rightmost", "topmost", "bottom", "list", "first", "yes", "no"]
VOCABULARY = [*SPECIAL, *WORDS, *COLOURS, *map(str, range(10))]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ':' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ ' <image>' if part['type'] == 'image' else ' ' + part['text'] }}"
    "{% endfor %}{% endif %}"
    "{{ ' </s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tokenizer(
    vocabulary: Sequence[str] = VOCABULARY, markers: Sequence[str] = ("<image>",)
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `vocabulary`; lower-cases, splits at spaces and at "?", puts <s> in front.

    markers: the words of which the processor puts one in the place of each visual token.
    """
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("?", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(markers),
        padding_side="left",
        model_max_length=1024,
    )


def build_processor() -> LlavaProcessor:
    """Images are resized to 168 x 168 without a crop; `<image>` becomes 144 tokens."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            do_center_crop=False,
            image_mean=[0.3] * 3,
            image_std=[0.3] * 3,
        ),
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def build_model() -> LlavaForConditionalGeneration:
    """The architecture with random weights: about 2.2 million parameters."""
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=5,
        num_attention_heads=3,
        hidden_act="gelu",  # one kernel where quick_gelu is three
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=96,
    )
    special = {
        f"{name}_token_id": VOCABULARY.index(word) for name, word in (("pad", "<pad>"), ("bos", "<s>"), ("eos", "</s>"))
    }
    text = LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=8,
        num_attention_heads=4,
        vocab_size=len(VOCABULARY),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **special,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=VOCABULARY.index("<image>"),
            image_seq_length=VISUAL_TOKENS,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
            **special,
        )
    )
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight[1:] = _grid_waves(vision.hidden_size)
    return model


def _grid_waves(dim: int) -> torch.Tensor:
    """Sines and cosines of row and column, (VISUAL_TOKENS, dim): the ViT then starts out knowing what is next to what,
    which shortens its training. They are trained on like any other weight."""
    wavelength = torch.logspace(math.log10(3), math.log10(4 * GRID), dim // 4)  # patches
    angle = 2 * math.pi * torch.arange(GRID)[:, None] / wavelength
    waves = torch.cat([angle.sin(), angle.cos()], 1) * 0.3  # as large as the patch embeddings
    row, column = waves.repeat_interleave(GRID, 0), waves.repeat(GRID, 1)
    return torch.cat([row, column], 1)
