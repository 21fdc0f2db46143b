# SPDX-License-Identifier: Apache-2.0
"""A tiny random-weight model of every family, and batches as its processor would hand them over.

Three samples a batch: prompts of different lengths, images of different sizes where the family has them, two media in
the second prompt. Every sample also comes alone, without padding.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
import transformers as hf
from torch import Tensor
from torch.nn.functional import pad

from vtprune.testing.configs import INIT_STD
from vtprune.testing.media import BOS, FIRST_WORD, IMAGE, PAD, VIDEO, Item
from vtprune.testing.tiny import FAMILIES
from vtprune.transformers_private.release import version

# -- models -----------------------------------------------------------------------------------------------------------

NAMES = tuple(FAMILIES)
"""All families, those included that the installed transformers lacks."""
CARRY_STATE = tuple(name for name, family in FAMILIES.items() if family.carries_state)
"""Families whose language models have layers that carry a state, or an index: nothing can go inside them."""
PRUNED_INSIDE = tuple(name for name in NAMES if name not in CARRY_STATE and not FAMILIES[name].attention_unread)
"""Families inside whose language models tokens can go, by attention too."""
ALWAYS_EAGER = tuple(name for name, family in FAMILIES.items() if family.always_eager)
"""Families whose language models do what sdpa cannot: Gemma 2 caps attention logits, gpt-oss has sinks."""
IMAGES_FIRST = tuple(name for name, family in FAMILIES.items() if family.images_first)
"""Families whose prompts begin with the images, and have at least one."""
KINDRED = tuple(name for name, family in FAMILIES.items() if family.kindred)
"""Families in which little is new, beside another one."""


def model_class(name: str) -> str:
    """Name of the class in transformers behind a family."""
    return FAMILIES[name].class_name


def is_available(name: str) -> bool:
    """Whether the installed transformers has a family's class, and what that needs is installed."""
    family = FAMILIES[name]
    return hasattr(hf, family.class_name) and version() >= family.since and find_spec(family.package) is not None


def build(name: str, attention: str = "sdpa", **overrides):
    """A freshly built model in eval mode; the same name gives the same weights.

    overrides: fields of the text config, e.g. `sliding_window=24`.
    """
    class_name, config = FAMILIES[name].class_name, FAMILIES[name].config
    if name in ALWAYS_EAGER and attention == "sdpa":
        whole = "sdpa" if getattr(hf, class_name)._supports_sdpa else "eager"
        attention = {"": whole, "vision_config": "sdpa", "text_config": "eager"}
    elif attention == "sdpa" and not getattr(hf, class_name)._supports_sdpa:  # because of its encoder
        attention = {"": "eager", "text_config": "sdpa"}
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, name)))
        model = getattr(hf, class_name)._from_config(config(**overrides), attn_implementation=attention)
        for parameter_name, parameter in model.named_parameters():
            gain = parameter.ndim == 1 and (parameter_name.endswith(".weight") or "lambda" in parameter_name)
            if gain:  # of a norm or a residual branch: wide ones would drown or blow up the layer
                parameter.data += 0.1 * torch.randn_like(parameter)
            elif parameter_name.endswith("A_log"):  # states that last: short ones leave sums of tiny numbers
                torch.nn.init.normal_(parameter, mean=-3.0, std=INIT_STD)
            else:
                torch.nn.init.normal_(parameter, std=INIT_STD)
    if (mend := FAMILIES[name].mend) is not None:
        mend(model)
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.bos_token_id, settings.do_sample = None, PAD, BOS, False
    return model.eval()


@functools.cache
def shared(name: str, attention: str = "sdpa"):
    """The model that tests share; whoever uses it has to leave it as it was."""
    return build(name, attention)


# -- batches ----------------------------------------------------------------------------------------------------------

VIDEO_NAMES = tuple(name for name, family in FAMILIES.items() if "video" in family.layouts)
MEDIA = {
    name: (*family.layouts, *(("mixed",) if len(family.layouts) == 2 and family.mixes_kinds else ()))
    for name, family in FAMILIES.items()
}
"""Family -> what its prompts can hold."""

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
            tensors = {key: x for key, x in inputs.items() if isinstance(x, Tensor)}  # some processors give lists
            return inputs | {k: x.to(device, dtype if x.is_floating_point() else None) for k, x in tensors.items()}

        return replace(self, inputs=moved(self.inputs), singles=[moved(single) for single in self.singles])

    def first_column(self, sample: int) -> int:
        """Column of `inputs["input_ids"]` that holds the sample's first real token."""
        return self.pads[sample] if self.padding_side == "left" else 0


def batch(name: str, model, samples: int = 3, media: str = "image", padding_side: str = "left") -> Batch:
    """Up to three samples for a model of the family `name`; the same call gives the same batch."""
    generator = torch.Generator().manual_seed(sum(map(ord, name + media)))
    kinds = {"I": "image", "V": "video"}
    shapes = {kind: iter(layout.shapes) for kind, layout in FAMILIES[name].layouts.items()}
    ids: list[Tensor] = []
    items: list[dict[str, list[Item]]] = []
    for prompt in _PROMPTS[media][:samples]:
        tokens = [BOS]
        media_items: dict[str, list[Item]] = {"image": [], "video": []}
        if FAMILIES[name].images_first:  # then BOS
            tokens, prompt = [], "I" * prompt.count("I") + "b" + "t" * prompt.count("t")
        for letter in prompt:
            if (kind := kinds.get(letter)) is not None:
                item = FAMILIES[name].layouts[kind].make(model, next(shapes[kind]), prompt.count(letter), generator)
                media_items[kind].append(item)
                tokens += item.ids
            else:
                word = torch.randint(FIRST_WORD, IMAGE, (1,), generator=generator).item()
                tokens.append(BOS if letter == "b" else word)
        ids.append(torch.tensor(tokens))
        items.append(media_items)
    longest = max(map(len, ids))
    return Batch(
        inputs=_inputs(name, model, ids, items, padding_side),
        singles=[
            _inputs(name, model, [one], [media_items], padding_side)
            for one, media_items in zip(ids, items, strict=True)
        ],
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
    if (token_types := FAMILIES[name].token_types) is not None:
        inputs |= token_types(columns)
    for kind, layout in FAMILIES[name].layouts.items():
        of_kind = [media_items[kind] for media_items in items]
        if any(of_kind):
            inputs |= layout.collate(of_kind)
    if "pixel_values" in inputs and "pixel_values" not in inspect.signature(model.forward).parameters:
        inputs["pixel_values_images"] = inputs.pop("pixel_values")  # Video-LLaVA up to transformers 5.20
    return inputs
