# SPDX-License-Identifier: Apache-2.0
"""A tokenizer for the processors of tiny models, with the special tokens of each family."""

from __future__ import annotations

import re

import transformers as hf
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Prepend
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

from vtprune.testing.media import (
    BOS,
    BREAK,
    END,
    FIRST_WORD,
    GLOBAL,
    IMAGE,
    NEWLINE,
    PAD,
    ROW_COLUMN,
    START,
    VIDEO,
    VOCABULARY,
)

_KNOWN_WORDS = """
: ? . < > 0 1 2 3 4 5 6 7 8 9 a and answer are better bigger compare crops first Frame1 Frame2 Frame3 Frame4 happens
help here Here image in is look me now one original picture seconds see some tell the then there this to two what which
who with word you Time 00
"""

IMAGE_TOKENS, VIDEO_TOKENS = {"image_token": ("<image>", IMAGE)}, {"video_token": ("<video>", VIDEO)}
QWEN_TOKENS = {
    "image_token": ("<|image_pad|>", IMAGE),
    "video_token": ("<|video_pad|>", VIDEO),
    "vision_start_token": ("<|vision_start|>", START),
    "vision_end_token": ("<|vision_end|>", END),
}
PIXTRAL_TOKENS = {
    "image_token": ("[IMG]", IMAGE),
    "image_break_token": ("[IMG_BREAK]", BREAK),
    "image_end_token": ("[IMG_END]", END),
}
IDEFICS_TOKENS = {
    **IMAGE_TOKENS,
    "fake_image_token": ("<fake_token_around_image>", BREAK),
    "global_image_token": ("<global-img>", GLOBAL),
    "end_of_utterance_token": ("<end_of_utterance>", ROW_COLUMN),
} | {f"row_{row}_col_{col}": (f"<row_{row}_col_{col}>", 120 + 6 * row + col) for row in (1, 2) for col in (1, 2, 3)}
INTERN_TOKENS = {
    "context_image_token": ("<IMG_CONTEXT>", IMAGE),
    "start_image_token": ("<img>", START),
    "end_image_token": ("</img>", END),
    **VIDEO_TOKENS,
}
GEMMA_TOKENS = {
    "image_token": ("<image_soft_token>", IMAGE),
    "boi_token": ("<start_of_image>", START),
    "eoi_token": ("<end_of_image>", END),
}
AYA_TOKENS = {
    "image_patch_token": ("<|IMG_PATCH|>", IMAGE),
    "start_of_img_token": ("<|START_OF_IMG|>", START),
    "end_of_img_token": ("<|END_OF_IMG|>", END),
    "tile_global_token": ("TILE_GLOBAL", GLOBAL),
} | {f"tile_{number}": (f"TILE_{number}", 120 + number) for number in range(1, 5)}
HUNYUAN_TOKENS = {
    **IMAGE_TOKENS,
    "image_start_token": ("<image_start>", START),
    "image_end_token": ("<image_end>", END),
}
COHERE_TOKENS = {
    **IMAGE_TOKENS,
    "boi_token": ("<|START_OF_IMG|>", START),
    "eoi_token": ("<|END_OF_IMG|>", END),
    "img_line_break_token": ("<|IMG_LINE_BREAK|>", BREAK),
}
MOLMO_TOKENS = {
    "image_token": ("<|image|>", 145),
    "video_token": ("<|video|>", VIDEO),
    "image_patch_token": ("<im_patch>", IMAGE),
    "image_column_token": ("<im_col>", BREAK),
    "image_start_token": ("<im_start>", START),
    "low_image_start_token": ("<low_res_im_start>", ROW_COLUMN),
    "image_end_token": ("<im_end>", END),
    "frame_start_token": ("<frame_start>", GLOBAL),
    "frame_end_token": ("<frame_end>", NEWLINE),
    "image_low_token": ("<im_low>", 146),
}


def tokenizer(special: dict[str, tuple[str, int]], prefix: str = "") -> hf.PreTrainedTokenizerFast:
    """special: attribute -> token and id, beyond those that every family has. prefix: a token before every stretch of
    text, as SentencePiece has it; special tokens of the family are then words like others.
    """
    vocabulary = {"<pad>": PAD, "<s>": BOS} | dict(special.values())
    if NEWLINE not in vocabulary.values():
        vocabulary["\n"] = NEWLINE
    words = ["</s>", "<unk>", "\n\n", *_KNOWN_WORDS.split()]  # a blank line is one token, as in real vocabularies
    words += [prefix] if prefix else []
    vocabulary |= {word: FIRST_WORD + index for index, word in enumerate(words)}
    # Without gaps: tokens that a processor adds must not get an id twice.
    vocabulary |= {f"<unused{index}>": index for index in set(range(VOCABULARY)) - set(vocabulary.values())}
    assert len(vocabulary) == VOCABULARY
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    pieces = [r"\n+", r"\w+", r"[^\w\s]"]
    if prefix:
        core.normalizer = Prepend(prefix)
        pieces[:0] = [re.escape(token) for token, _ in special.values()]
    core.pre_tokenizer = Split(Regex("|".join(pieces)), behavior="removed", invert=True)
    if special not in (QWEN_TOKENS, INTERN_TOKENS, MOLMO_TOKENS):
        core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={} if prefix else {name: token for name, (token, _) in special.items()},
    )
