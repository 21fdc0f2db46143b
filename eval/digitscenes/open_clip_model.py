# SPDX-License-Identifier: Apache-2.0
"""The DigitScenes CLIP: a small model of open_clip (pip install "vtprune[clip]") with a word-level tokenizer.

open_clip takes seconds to import, so it is imported when the model is built.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .scenes import COLOURS

if TYPE_CHECKING:
    from open_clip import CLIP
    from open_clip.tokenizer import HFTokenizer

OPEN_CLIP_PATH = Path(__file__).parent / "open_clip_model"
"""Folder of the configuration, the trained weights and the tokenizer."""

OPEN_CLIP_NAME = "digitscenes-clip"
"""Name of the model in open_clip, once `build_open_clip` or `load_open_clip` has registered its configuration."""

WORDS = ["a", "an", "the", "photo", "image", "of", "digit", "number", "in", *COLOURS, *map(str, range(10))]
VOCABULARY = ["<pad>", "<s>", "<unk>", *WORDS, "</s>"]
"""open_clip reads a text's feature at the largest id, so "</s>" is last."""

_MEAN_AND_STD = (0.3, 0.3, 0.3)  # the image processor of the DigitScenes LLaVA, whose encoder this model starts from


def build_open_clip_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `VOCABULARY`; lower-cases, leaves out full stops, splits at spaces."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(".", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(word, VOCABULARY.index(word)) for word in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=_text_config()["context_length"],
    )


def build_open_clip(weights: Path | None = None) -> tuple[CLIP, Callable[[Image.Image], torch.Tensor]]:
    """The model in eval mode, and its preprocessing of an RGB image: float (3, 168, 168).

    weights: a safetensors file; default random weights.
    """
    import open_clip

    if OPEN_CLIP_NAME not in open_clip.list_models():
        open_clip.add_model_config(_config_file())
    model, _, preprocess = open_clip.create_model_and_transforms(
        OPEN_CLIP_NAME,
        pretrained=None if weights is None else str(weights),
        image_mean=_MEAN_AND_STD,
        image_std=_MEAN_AND_STD,
        image_interpolation="bicubic",
        image_resize_mode="squash",  # no crop: the digit may be at the edge
    )
    return model.eval(), preprocess


def load_open_clip() -> tuple[CLIP, HFTokenizer, Callable[[Image.Image], torch.Tensor]]:
    """The trained model in eval mode on the CPU, its tokenizer, and its preprocessing.

    model, tokenizer, preprocess = load_open_clip()
    features = model.encode_image(preprocess(image)[None])  # (1, 64)
    features = model.encode_text(tokenizer(["a red 7"]))  # (1, 64)

    The tokenizer gives ids, (texts, 10); longer texts are cut off. `open_clip.get_tokenizer` does not find it, as it
    knows tokenizers by hub name or an absolute folder only.
    """
    from open_clip.tokenizer import HFTokenizer

    model, preprocess = build_open_clip(OPEN_CLIP_PATH / "model.safetensors")
    tokenizer = HFTokenizer(str(OPEN_CLIP_PATH), context_length=_text_config()["context_length"])
    return model, tokenizer, preprocess


def _config_file() -> Path:
    return OPEN_CLIP_PATH / f"{OPEN_CLIP_NAME}.json"


def _text_config() -> dict:
    return json.loads(_config_file().read_text())["text_cfg"]
