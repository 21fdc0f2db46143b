# SPDX-License-Identifier: Apache-2.0
"""A tiny random-weight model of every family, and batches as its processor would hand them over.

Three samples a batch: prompts of different lengths, images of different sizes where the family has them, two media in
the second prompt. Every sample also comes alone, without padding.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import transformers as hf
from torch import Tensor
from torch.nn.functional import pad

from vtprune.testing.media import (
    BOS,
    END,
    FIRST_WORD,
    IMAGE,
    LAYOUTS,
    MERGE,
    PAD,
    PATCH,
    START,
    TILE,
    VIDEO,
    VOCABULARY,
    Item,
)

WIDTH = 32
INIT_STD = 0.2
"""Wide enough that a wrong mask, position or token moves logits by far more than the tolerance of any comparison."""

# -- models -----------------------------------------------------------------------------------------------------------

_TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=None,
)
_VISION = dict(hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
_QWEN_VISION = dict(patch_size=PATCH, spatial_merge_size=MERGE, temporal_patch_size=2, depth=4, num_heads=4)
_QWEN_IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
_MROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]})
_ALTERNATING = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=512)
_PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
_SIDE_4 = [[32, 64], [64, 32], [64, 64]]


def _clip(size: int, patch: int):
    return hf.CLIPVisionConfig(**_VISION, image_size=size, patch_size=patch)


def _siglip(size: int, patch: int, **fields):
    return hf.SiglipVisionConfig(**_VISION, image_size=size, patch_size=patch, vision_use_head=False, **fields)


def _pixtral():
    return hf.PixtralVisionConfig(**_VISION, image_size=56, patch_size=PATCH)


def _llama(**text):
    return hf.LlamaConfig(**_TEXT | text)


def _mistral(**text):
    return hf.MistralConfig(**_TEXT | dict(head_dim=8, sliding_window=None) | text)


def _qwen2(**text):
    return hf.Qwen2Config(**_TEXT | text)


def _idefics(config: str) -> Callable:
    vision = _VISION | dict(image_size=TILE, patch_size=PATCH)
    return lambda **text: getattr(hf, config)(
        vision_config=vision, text_config=_llama(**text), image_token_id=IMAGE, scale_factor=MERGE, pad_token_id=PAD
    )


# Classes by name: a release of transformers that lacks one still has the others.
_MODELS: dict[str, tuple[str, Callable]] = {
    "llava": (
        "LlavaForConditionalGeneration",
        lambda **text: hf.LlavaConfig(vision_config=_clip(42, 7), text_config=_llama(**text), image_token_index=IMAGE),
    ),
    "pixtral": (
        "LlavaForConditionalGeneration",
        lambda **text: hf.LlavaConfig(
            vision_config=_pixtral(),
            text_config=_mistral(**text),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
    ),
    "llava_next": (
        "LlavaNextForConditionalGeneration",
        lambda **text: hf.LlavaNextConfig(
            vision_config=_clip(TILE, 8),
            text_config=_llama(**text),
            image_token_index=IMAGE,
            image_grid_pinpoints=_PINPOINTS,
        ),
    ),
    "llava_next_video": (  # an even number of patches a side: frames are pooled 2x2
        "LlavaNextVideoForConditionalGeneration",
        lambda **text: hf.LlavaNextVideoConfig(
            vision_config=_clip(32, 8),
            text_config=_llama(**text),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=_SIDE_4,
        ),
    ),
    "llava_onevision": (  # 2x2 tiles exceed the maximum, so that their mosaic is resized
        "LlavaOnevisionForConditionalGeneration",
        lambda **text: hf.LlavaOnevisionConfig(
            vision_config=_siglip(TILE, 8),
            text_config=_qwen2(**text),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=_PINPOINTS,
            vision_aspect_ratio="anyres_max_2",
        ),
    ),
    "video_llava": (
        "VideoLlavaForConditionalGeneration",
        lambda **text: hf.VideoLlavaConfig(
            vision_config=_clip(32, 8), text_config=_llama(**text), image_token_index=IMAGE, video_token_index=VIDEO
        ),
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        lambda **text: hf.Qwen2VLConfig(
            vision_config=_QWEN_VISION | dict(embed_dim=WIDTH, hidden_size=WIDTH, mlp_ratio=2),
            text_config=_TEXT | _MROPE | text,
            **_QWEN_IDS,
        ),
    ),
    "qwen2_5_vl": (  # windows of 2x2 merged tokens, so that the tower reorders them
        "Qwen2_5_VLForConditionalGeneration",
        lambda **text: hf.Qwen2_5_VLConfig(
            vision_config=_QWEN_VISION
            | dict(hidden_size=WIDTH, intermediate_size=48, out_hidden_size=WIDTH)
            | dict(window_size=16, fullatt_block_indexes=[1, 3], tokens_per_second=2),
            text_config=_TEXT | _MROPE | text,
            **_QWEN_IDS,
        ),
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        lambda **text: hf.Qwen3VLConfig(
            vision_config=_QWEN_VISION
            | dict(hidden_size=WIDTH, intermediate_size=48, out_hidden_size=WIDTH)
            | dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1, 2]),
            text_config=_TEXT | _MROPE | dict(head_dim=8) | text,
            **_QWEN_IDS,
        ),
    ),
    "internvl": (
        "InternVLForConditionalGeneration",
        lambda **text: hf.InternVLConfig(
            vision_config=hf.InternVLVisionConfig(**_VISION, image_size=[TILE] * 2, patch_size=[PATCH] * 2),
            text_config=_qwen2(**text),
            image_token_id=IMAGE,
            image_seq_length=9,
        ),
    ),
    "idefics3": ("Idefics3ForConditionalGeneration", _idefics("Idefics3Config")),
    "smolvlm": ("SmolVLMForConditionalGeneration", _idefics("SmolVLMConfig")),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        lambda **text: hf.Gemma3Config(
            vision_config=_siglip(32, 4),
            text_config=hf.Gemma3TextConfig(
                **_TEXT | _ALTERNATING | dict(layer_types=["sliding_attention", "full_attention"] * 4) | text
            ),
            mm_tokens_per_image=16,
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
        ),
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        lambda **text: hf.PaliGemmaConfig(
            vision_config=_siglip(35, 7, projection_dim=WIDTH),
            text_config=hf.GemmaConfig(**_TEXT | dict(head_dim=8) | text),
            image_token_index=IMAGE,
            projection_dim=WIDTH,
        ),
    ),
    "paligemma2": (  # caps low enough to bend what they cap
        "PaliGemmaForConditionalGeneration",
        lambda **text: hf.PaliGemmaConfig(
            vision_config=_siglip(35, 7, projection_dim=WIDTH),
            text_config=hf.Gemma2Config(
                **_TEXT | _ALTERNATING | dict(attn_logit_softcapping=4.0, final_logit_softcapping=8.0) | text
            ),
            image_token_index=IMAGE,
            projection_dim=WIDTH,
        ),
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        lambda **text: hf.Mistral3Config(
            vision_config=_pixtral(),
            text_config=_mistral(**text),
            image_token_index=IMAGE,
            spatial_merge_size=MERGE,
        ),
    ),
}

NAMES = tuple(_MODELS)
"""All families, those included that the installed transformers lacks."""


def model_class(name: str) -> str:
    """Name of the class in transformers behind a family."""
    return _MODELS[name][0]


def is_available(name: str) -> bool:
    """Whether the installed transformers has a family's class."""
    return hasattr(hf, model_class(name))


def build(name: str, attention: str = "sdpa", **overrides):
    """A freshly built model in eval mode; the same name gives the same weights.

    overrides: fields of the text config, e.g. `sliding_window=24`.
    """
    class_name, config = _MODELS[name]
    if name == "paligemma2" and attention == "sdpa":  # Gemma 2 caps attention logits, which sdpa cannot
        attention = {"": "sdpa", "vision_config": "sdpa", "text_config": "eager"}
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, name)))
        model = getattr(hf, class_name)._from_config(config(**overrides), attn_implementation=attention)
        for parameter_name, parameter in model.named_parameters():
            gain = parameter.ndim == 1 and (parameter_name.endswith(".weight") or "lambda" in parameter_name)
            if gain:  # of a norm or a residual branch: wide ones would drown or blow up the layer
                parameter.data += 0.1 * torch.randn_like(parameter)
            else:
                torch.nn.init.normal_(parameter, std=INIT_STD)
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.bos_token_id, settings.do_sample = None, PAD, BOS, False
    return model.eval()


@functools.cache
def shared(name: str, attention: str = "sdpa"):
    """The model that tests share; whoever uses it has to leave it as it was."""
    return build(name, attention)


# -- batches ----------------------------------------------------------------------------------------------------------

VIDEO_NAMES = tuple(name for name, layouts in LAYOUTS.items() if "video" in layouts)
MEDIA = {name: ("image", "video", "mixed") if name in VIDEO_NAMES else ("image",) for name in NAMES}

# Column types that a processor adds, from the ids.
_TOKEN_TYPES: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "gemma3": lambda ids: {"token_type_ids": (ids == IMAGE).long()},
    "paligemma": lambda ids: {"token_type_ids": torch.zeros_like(ids)},
    "qwen2_vl": lambda ids: {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()},
}
_TOKEN_TYPES |= {"paligemma2": _TOKEN_TYPES["paligemma"]}
_TOKEN_TYPES |= {name: _TOKEN_TYPES["qwen2_vl"] for name in ("qwen2_5_vl", "qwen3_vl")}

# A prompt a string: `t` is a text token, `I` an image, `V` a video. The last mixed prompt has no video, the
# second sparse one nothing but text.
_PROMPTS = {
    "image": ("tttIttt", "tIItttttttttt", "ttItttttt"),
    "video": ("ttVtttt", "tVtVttttttttt", "tttVttttt"),
    "mixed": ("tItVttttt", "ttVtIttttttttt", "tItttttt"),
    "sparse": ("ttItttt", "ttttttttt", "tIttttttttt"),
}


@dataclass(frozen=True)
class Batch:
    """Prompts with their media, padded to one batch, and each one alone."""

    inputs: dict[str, Tensor]
    singles: list[dict[str, Tensor]]
    """one sample each, without padding"""
    visual_ids: tuple[int, ...]
    pads: list[int]
    """padding columns of each sample in `inputs`"""
    padding_side: str

    def __len__(self) -> int:
        return len(self.singles)

    def to(self, device: str | torch.device, dtype: torch.dtype) -> Batch:
        """The same on another device, pixels in another dtype."""

        def moved(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            return {key: x.to(device, dtype if x.is_floating_point() else None) for key, x in inputs.items()}

        return replace(self, inputs=moved(self.inputs), singles=[moved(single) for single in self.singles])

    def first_column(self, sample: int) -> int:
        """Column of `inputs["input_ids"]` that holds the sample's first real token."""
        return self.pads[sample] if self.padding_side == "left" else 0


def batch(name: str, model, samples: int = 3, media: str = "image", padding_side: str = "left") -> Batch:
    """Up to three samples for a model of the family `name`; the same call gives the same batch."""
    generator = torch.Generator().manual_seed(sum(map(ord, name + media)))
    kinds = {"I": "image", "V": "video"}
    shapes = {kind: iter(layout.shapes) for kind, layout in LAYOUTS[name].items()}
    ids: list[Tensor] = []
    items: list[dict[str, list[Item]]] = []
    for prompt in _PROMPTS[media][:samples]:
        tokens = [BOS]
        own: dict[str, list[Item]] = {"image": [], "video": []}
        if name.startswith("paligemma"):  # images first, then BOS
            tokens, prompt = [], "I" * prompt.count("I") + "b" + "t" * prompt.count("t")
        for letter in prompt:
            if (kind := kinds.get(letter)) is not None:
                item = LAYOUTS[name][kind].make(model, next(shapes[kind]), prompt.count(letter), generator)
                own[kind].append(item)
                tokens += item.ids
            else:
                word = torch.randint(FIRST_WORD, IMAGE, (1,), generator=generator).item()
                tokens.append(BOS if letter == "b" else word)
        ids.append(torch.tensor(tokens))
        items.append(own)
    longest = max(map(len, ids))
    return Batch(
        inputs=_inputs(name, model, ids, items, padding_side),
        singles=[_inputs(name, model, [one], [own], padding_side) for one, own in zip(ids, items, strict=True)],
        visual_ids=(IMAGE, VIDEO) if name in VIDEO_NAMES else (IMAGE,),
        pads=[longest - len(one) for one in ids],
        padding_side=padding_side,
    )


def _inputs(
    name: str, model, ids: list[Tensor], items: list[dict[str, list[Item]]], padding_side: str
) -> dict[str, Tensor]:
    longest = max(map(len, ids))
    widths = [(longest - len(one), 0) if padding_side == "left" else (0, longest - len(one)) for one in ids]
    columns = torch.stack([pad(one, width, value=PAD) for one, width in zip(ids, widths, strict=True)])
    real = torch.stack([pad(torch.ones_like(one), width) for one, width in zip(ids, widths, strict=True)])
    inputs = {"input_ids": columns, "attention_mask": real}
    if name in _TOKEN_TYPES:
        inputs |= _TOKEN_TYPES[name](columns)
    for kind, layout in LAYOUTS[name].items():
        of_kind = [own[kind] for own in items]
        if any(of_kind):
            inputs |= layout.collate(of_kind)
    if "pixel_values" in inputs and "pixel_values" not in inspect.signature(model.forward).parameters:
        inputs["pixel_values_images"] = inputs.pop("pixel_values")  # Video-LLaVA up to transformers 5.20
    return inputs
