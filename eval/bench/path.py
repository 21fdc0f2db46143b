# SPDX-License-Identifier: Apache-2.0
"""The steps of `generate()` one by one: encode, prefill, then one token after another."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from vtprune.stages.cache import CacheLayout, PrunedLayer
from vtprune.transformers_private import CACHE, has_keys

PIXELS = "pixel_values"


def encode(model: Any, inputs: Mapping[str, Tensor]) -> Any:
    """What the base model's `get_image_features` returns."""
    function = model.base_model.get_image_features
    known = inspect.signature(function).parameters
    return function(**{name: value for name, value in inputs.items() if name in known}, return_dict=True)


def prefill(model: Any, inputs: Mapping[str, Tensor], encoded: Any, cache: Any = None) -> tuple[Tensor, Any]:
    """The first token of each answer, (batch, 1), and the KV cache: `cache`, an empty one, or a new one that grows."""
    rest = {name: value for name, value in inputs.items() if name != PIXELS}
    output = model(**rest, mm_encoder_outputs={"image": encoded}, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1:].argmax(-1), output[CACHE]


def decode(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """The token (batch, 1) that follows `ids` (batch, n)."""
    return model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)


def compiled_decode(model: Any, device: torch.device) -> Callable[[Any, Tensor, Any], Tensor]:
    """`decode`, compiled as by `generate()`: with CUDA graphs on a GPU, into several graphs where one is not enough."""
    from torch._dynamo.utils import counters  # the compiler takes seconds to import

    # What was compiled in another session does not fit, and after a few of these torch would give up.
    torch.compiler.reset()
    counters.clear()
    mode = None if device.type == "cpu" else "reduce-overhead"
    step = torch.compile(decode, dynamic=False, mode=mode)

    def run(model: Any, ids: Tensor, cache: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return step(model, ids, cache).clone()  # the next step writes to the same memory

    return run


def graphs_compiled() -> int:
    """How many graphs were compiled since the last `compiled_decode`."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def static_cache(model: Any, columns: int) -> Any:
    """An empty cache of a fixed number of columns."""
    return StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=columns)


def prefill_text(model: Any, ids: Tensor) -> Tensor:
    """The first token (batch, 1) of an answer to text (batch, n) alone."""
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)


def grow(model: Any, ids: Tensor, cache: Any, tokens: int) -> None:
    """Makes the cache as long as after `tokens` more tokens. `ids` (batch, 1), the last ones, stand for all of them.

    The time of a step depends on the length of the cache, not on its content, so the keys and values of the last column
    are repeated. If a method keeps account of every column, the tokens really pass through the model. A static cache
    has its whole length from the start, and stays as it is.
    """
    if isinstance(cache, StaticCache):
        return
    if any(isinstance(layer, PrunedLayer) and layer.slots is not None for layer in cache.layers):
        decode(model, ids.expand(-1, tokens), cache)
        return
    grown: dict[int, CacheLayout] = {}
    for index, layer in enumerate(cache.layers):
        if not has_keys(layer):
            continue
        if isinstance(layer, PrunedLayer):
            # Layers that share a layout also share masks, so they have to go on sharing it.
            old = layer.layout
            layer.layout = grown.setdefault(id(old), old.extend(tokens, None, 0, None, layer.physical))
        last = layer.keys[:, :, -1:], layer.values[:, :, -1:]
        cache.update(*(column.expand(-1, -1, tokens, -1) for column in last), index)


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if has_keys(layer))
