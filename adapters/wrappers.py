# SPDX-License-Identifier: Apache-2.0
"""What is not a model itself, but close to one: the model in it, or what to pass."""

from __future__ import annotations

from os import PathLike
from typing import Any

from torch import nn

from vtprune.errors import UnsupportedModelError


def unwrapped(model: Any) -> nn.Module:
    """The model inside a wrapper: peft, distributed training, a pipeline, an Omni model.

    Raises UnsupportedModelError if there is none, or if hooks on it would not be reached.
    """
    if isinstance(model, nn.DataParallel):
        raise UnsupportedModelError(
            "DataParallel runs copies of the model in threads, and hooks do not follow; pass model.module and use one "
            "device, or DistributedDataParallel"
        )
    if hasattr(model, "get_base_model"):  # peft
        return unwrapped(model.get_base_model())
    if type(model).__name__ == "PeftMixedModel":  # peft with adapters of several kinds
        return unwrapped(model.base_model.model)
    # The second class is the first version of FSDP. It is compared by name, because its import is slow.
    if isinstance(model, nn.parallel.DistributedDataParallel) or type(model).__name__ == "FullyShardedDataParallel":
        return unwrapped(model.module)
    if isinstance(model, nn.Module):
        # Of an Omni model the thinker answers; a talker speaks what it says.
        thinker = getattr(model, "thinker", None)
        return model if thinker is None else unwrapped(thinker)
    if isinstance(getattr(model, "model", None), nn.Module):  # a pipeline
        return unwrapped(model.model)
    raise UnsupportedModelError(_no_model(model))


def _no_model(thing: Any) -> str:
    """What to pass instead of something that holds no model."""
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    if isinstance(thing, str | PathLike):
        return f'{str(thing)!r} is a name, not a model; load it: AutoModelForImageTextToText.from_pretrained("{thing}")'
    if isinstance(thing, type):
        return f"{thing.__name__} is a class, not a model; load one: {thing.__name__}.from_pretrained(...)"
    if isinstance(thing, ProcessorMixin | PreTrainedTokenizerBase):
        return f"a {type(thing).__name__} makes a model's inputs and holds no model; pass the model itself"
    return f"a {type(thing).__name__} is not a model; pass the model, as AutoModelForImageTextToText loads it"
