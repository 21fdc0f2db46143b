# SPDX-License-Identifier: Apache-2.0
"""Arguments of decoders: their names, and those that are not known."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from vtprune.errors import UnsupportedStageError, VTPruneError
from vtprune.transformers_private.release import releases, version

_CACHE_NAMES = ("cache", "past_key_values")
CACHE = _CACHE_NAMES[0] if version() >= (5, 24) else _CACHE_NAMES[1]
"""What the installed release calls a KV cache, as an argument and in what models return."""

_DEEPSTACK = {"deepstack_visual_embeds": "visual_pos_masks", "deepstack_features": "vision_mask"}
"""What decoders call the features that they add to the visual tokens in their layers -> what they call the mask of the
columns of these tokens."""

_LAST_ROWS = "logits_to_keep"

_BY_TOKEN = ("per_layer_inputs", "per_layer_input", "ple_input_ids", "moe_mm_token_type_ids")
"""Arguments of decoders and their layers that are (batch, tokens, ...), and are cut along with the tokens.

A token that others were merged into keeps its own. `per_layer_inputs` and `per_layer_input`: embeddings that Gemma 3n
and Gemma 4 add to each token in every layer, all of them for the decoder and one slice for a layer.
`ple_input_ids`: ids whose runs Qwen4 hashes to embeddings. `moe_mm_token_type_ids`: which tokens are for the experts
that Ernie 4.5 VL has for images and videos.
"""

_KNOWN_ARGUMENTS = {
    *_CACHE_NAMES,
    *_BY_TOKEN,
    *_DEEPSTACK,
    *_DEEPSTACK.values(),
    "attention_mask",
    "conv_mask",  # made of the attention mask
    "hidden_states",
    "input_ids",
    "inputs_embeds",
    "labels",  # handed on by models that compute the loss outside, and read by no layer
    "mamba_attention_mask",
    "position_embeddings",
    "position_ids",
}
"""Arguments of decoders and their layers that may hold one entry a token, and that are cut along."""


def cache_of(kwargs: Mapping[str, Any]) -> Cache | None:
    """The KV cache among the arguments of a model, whatever the release calls it.

    Raises VTPruneError if one arrives under a name that is not known.
    """
    for name in _CACHE_NAMES:
        if kwargs.get(name) is not None:
            return kwargs[name]
    for name, value in kwargs.items():
        if isinstance(value, Cache):
            raise VTPruneError(f"the KV cache arrives as {name!r}, a name that is not known: {releases()}")
    return None


def with_cache(decoder: nn.Module, kwargs: Mapping[str, Any], cache: Cache | None) -> dict[str, Any]:
    """The arguments of a decoder with another KV cache, under the name that the decoder takes."""
    given = next((name for name in _CACHE_NAMES if name in kwargs), None)
    if given is None and (parameter := cache_parameter(decoder)) is not None:
        given = parameter.name
    if given is None:
        raise VTPruneError(f"{type(decoder).__name__} takes no KV cache under a name that is known: {releases()}")
    return {**kwargs, given: cache}


def cache_parameter(decoder: nn.Module) -> inspect.Parameter | None:
    """The parameter of a decoder's forward that takes the KV cache."""
    parameters = inspect.signature(decoder.forward).parameters
    return next((parameters[name] for name in _CACHE_NAMES if name in parameters), None)


def deepstack_of(kwargs: Mapping[str, Any]) -> dict[int, Tensor]:
    """The features that a decoder adds to the visual tokens (DeepStack): decoder layer, on whose input they are added
    -> (tokens, dim)."""
    given = next((kwargs[name] for name in _DEEPSTACK if kwargs.get(name) is not None), ())
    if isinstance(given, Mapping):
        return dict(given)
    # A list holds what is added to the output of the first layer, the second, ...
    return {layer + 1: features for layer, features in enumerate(given)}


def with_first_features(hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """The embeddings (batch, length, dim) that a decoder is called with, and in the place of zeros the features that it
    adds to the visual tokens on the input of its first layer, if it does so."""
    first = deepstack_of(kwargs).get(0)
    if first is None:
        return hidden
    mask = next(kwargs[mask] for name, mask in _DEEPSTACK.items() if kwargs.get(name) is not None)
    return hidden.masked_scatter(mask.to(hidden.device), first.to(hidden))


def drop_deepstack(kwargs: dict[str, Any]) -> None:
    """Take these features from the arguments of a decoder."""
    for name in (*_DEEPSTACK, *_DEEPSTACK.values()):
        kwargs.pop(name, None)


def by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The same arguments of a call of a decoder layer, all but the first by name."""
    if len(args) < 2:
        return args, kwargs
    return args[:1], dict(zip(_names(type(module))[2:], args[1:], strict=False)) | kwargs


@functools.cache
def _names(cls: type) -> tuple[str, ...]:
    """Parameters of a module's forward, `self` first."""
    return tuple(inspect.signature(cls.forward).parameters)


def told_by_token(layer: nn.Module, config: Any) -> list[str]:
    """Arguments by which a decoder layer is told something of each token, beside its hidden state. config: of the
    language model."""
    names = [name for name in _names(type(layer)) if name in _BY_TOKEN]
    embeds = getattr(config, "hidden_size_per_layer_input", 0)
    return names if embeds else [name for name in names if name != "per_layer_input"]


def check_nothing_told(reviving: str, layer: nn.Module, config: Any) -> None:
    """Raise UnsupportedStageError for a method that brings tokens back if a decoder layer is told something of each."""
    if told := told_by_token(layer, config):
        raise UnsupportedStageError(
            f"{reviving} brings tokens back into the KV cache, and layers of this model are told something of each "
            f"token ({', '.join(told)}), which is not kept; methods that bring nothing back work: fastv, transprune"
        )


def cut_along(kwargs: dict[str, Any], cut: Callable[[Tensor], Tensor]) -> None:
    """Replace arguments that are (batch, tokens, ...) by what `cut` makes of them."""
    for name in _BY_TOKEN:
        if kwargs.get(name) is not None:
            kwargs[name] = cut(kwargs[name])


def last_rows_only(kwargs: Mapping[str, Any]) -> int:
    """How many last tokens a decoder may leave alone in its last layers, by its arguments; 0 for all."""
    asked = kwargs.get(_LAST_ROWS, 0)
    return asked if isinstance(asked, int) else 0


def ask_for_all_rows(kwargs: dict[str, Any]) -> None:
    """Let a decoder compute all tokens in all layers."""
    if _LAST_ROWS in kwargs:
        kwargs[_LAST_ROWS] = 0


def check_arguments(where: str, kwargs: Mapping[str, Any], batch: int, length: int) -> None:
    """Raise UnsupportedStageError if an argument that is not known holds one entry a token: it would not be cut
    along."""
    for name, value in kwargs.items():
        if name in _KNOWN_ARGUMENTS:
            continue
        for tensor in _tensors(value):
            if tensor.shape[:2] in ((batch, length), (1, length)) or tensor.shape == (length,):
                raise UnsupportedStageError(
                    f"{where} is called with {name!r}, which holds one entry a token and is not known here, so that it "
                    f"cannot be cut along with the tokens: {releases()}"
                )


def _tensors(value: Any) -> Iterator[Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
