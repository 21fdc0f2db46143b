# SPDX-License-Identifier: Apache-2.0
"""Two prompts with an image each for a model of which nothing is known, padded to a batch, and each one alone.

They come from the processor beside the model's checkpoint. Without one they are made up from the config: random ids and
pixels, and as many placeholders as the model makes visual tokens of an image.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtprune.adapters.base import PIXELS
from vtprune.adapters.generic import Generic
from vtprune.errors import UnsupportedModelError

QUESTIONS = ("What is in the picture?", "Which of the two corners is the brighter one? Answer with a single word.")
SIZES = ((180, 120), (100, 160))
"""Width and height of the two pictures, in pixels."""
TEXT = ((3, 4), (2, 9))
"""Words before and behind the image of each prompt that is made up."""


@dataclass(frozen=True)
class ExamplePrompts:
    """Prompts for one model, on its device."""

    together: dict[str, Any]
    """inputs of both, padded on the left"""
    alone: list[dict[str, Any]]
    """inputs of each"""

    def first_column(self, sample: int) -> int:
        """Column of the padded batch that holds a sample's first token."""
        return self.together["input_ids"].shape[1] - self.alone[sample]["input_ids"].shape[1]


def example_prompts(adapter: Generic) -> ExamplePrompts:
    """Prompts for the model of an adapter. Raises UnsupportedModelError if none can be made."""
    processor = _processor(adapter.model)
    return _made_up(adapter) if processor is None else _processed(adapter, processor)


# -- by the processor -------------------------------------------------------------------------------------------------


def _processor(model: Any) -> Any:
    """The processor beside the checkpoint that a model was loaded from; None if there is none."""
    from transformers import AutoProcessor

    folder = model.config.name_or_path
    if not folder or not os.path.isdir(folder):
        return None
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, ImportError):
        return None
    return processor if getattr(processor, "chat_template", None) else None


def _processed(adapter: Generic, processor: Any) -> ExamplePrompts:
    import numpy as np
    from PIL import Image

    values = np.random.default_rng(0)
    conversations = []
    for question, (width, height) in zip(QUESTIONS, SIZES, strict=True):
        image = Image.fromarray(values.integers(0, 256, (height, width, 3), dtype=np.uint8))
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        conversations.append([{"role": "user", "content": content}])

    def inputs(batch: list) -> dict[str, Any]:
        options: dict[str, Any] = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
        given = processor.apply_chat_template(batch, padding=True, padding_side="left", **options)
        return _moved(adapter, dict(given))

    return ExamplePrompts(inputs(conversations), [inputs([conversation]) for conversation in conversations])


# -- made up ----------------------------------------------------------------------------------------------------------

_OPTIONAL = {"self", "kwargs", "return_dict"}


def _made_up(adapter: Generic) -> ExamplePrompts:
    arguments = _pixels(adapter, (0, 1))
    with torch.no_grad():
        output = adapter.base.get_image_features(**arguments, return_dict=True)
    lengths = [len(medium) for medium in adapter.media("image", arguments, adapter.features_of(output))]
    if len(lengths) != 2:
        raise UnsupportedModelError(f"two images were encoded as {len(lengths)}")
    ids = [_ids(adapter, *words, tokens) for words, tokens in zip(TEXT, lengths, strict=True)]

    def inputs(samples: tuple[int, ...]) -> dict[str, Any]:
        longest = max(len(ids[sample]) for sample in samples)
        rows = [pad(ids[sample], (longest - len(ids[sample]), 0)) for sample in samples]
        real = [pad(torch.ones_like(ids[sample]), (longest - len(ids[sample]), 0)) for sample in samples]
        made: dict[str, Any] = {"input_ids": torch.stack(rows), "attention_mask": torch.stack(real)}
        if "mm_token_type_ids" in inspect.signature(adapter.base.forward).parameters:
            made["mm_token_type_ids"] = (made["input_ids"] == adapter.visual_token_ids["image"]).int()
        return _moved(adapter, made | _pixels(adapter, samples))

    return ExamplePrompts(inputs((0, 1)), [inputs((0,)), inputs((1,))])


def _pixels(adapter: Generic, samples: tuple[int, ...]) -> dict[str, Any]:
    """Arguments of an encode call of the images of some samples."""
    parameters = inspect.signature(adapter.base.get_image_features).parameters
    vision = adapter.vision_config
    patch = _one(getattr(vision, "patch_size", None))
    if "image_grid_thw" in parameters and patch:
        side = getattr(vision, "spatial_merge_size", 1)
        grids = [(1, *(side * sides for sides in ((4, 2), (2, 3))[sample])) for sample in samples]
        channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", 3)
        width = channels * getattr(vision, "temporal_patch_size", 1) * patch**2
        pixels = [
            _noise(rows * columns, width, seed=sample)
            for sample, (_, rows, columns) in zip(samples, grids, strict=True)
        ]
        given: dict[str, Any] = {PIXELS["image"]: torch.cat(pixels), "image_grid_thw": torch.tensor(grids)}
    elif size := _one(getattr(vision, "image_size", None)):
        given = {PIXELS["image"]: torch.stack([_noise(3, size, size, seed=sample) for sample in samples])}
        if "image_sizes" in parameters and parameters["image_sizes"].default is inspect.Parameter.empty:
            given["image_sizes"] = torch.tensor([[size, size]] * len(samples))
    else:
        raise UnsupportedModelError("its config says neither `image_size` nor `patch_size`, so no image can be made up")
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in _OPTIONAL and name not in given
    ]
    if missing:
        raise UnsupportedModelError(
            f"its images come with {', '.join(missing)}, which cannot be made up; load the model from a folder that "
            "has its processor, too"
        )
    return _moved(adapter, given)


def _one(size: Any) -> int | None:
    return size[0] if isinstance(size, list | tuple) else size


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _ids(adapter: Generic, before: int, behind: int, tokens: int) -> Tensor:
    """Ids of a prompt: words, an image of so many tokens with what the config puts around it, words."""
    config, placeholder = adapter.config, adapter.visual_token_ids["image"]
    taken = {value for value in _special_ids(config) | _special_ids(adapter.text_config) if value is not None}
    words = [word for word in range(min(adapter.text_config.vocab_size, 4096)) if word not in taken and word != 0]
    generator = torch.Generator().manual_seed(tokens + behind)
    drawn = torch.tensor(words)[torch.randint(len(words), (before + behind,), generator=generator)]
    start, end = (getattr(config, f"vision_{place}_token_id", None) for place in ("start", "end"))
    image = [*([] if start is None else [start]), *[placeholder] * tokens, *([] if end is None else [end])]
    return torch.cat([drawn[:before], torch.tensor(image), drawn[before:]])


def _special_ids(config: Any) -> set[int]:
    names = [name for name in vars(config) if name.endswith(("_token_id", "_token_index"))]
    return {value for name in names if isinstance(value := getattr(config, name), int)}


def _moved(adapter: Generic, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs on the model's device, pixels in its dtype."""
    model = adapter.model
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        if torch.is_tensor(value)
        else value
        for name, value in inputs.items()
    }
