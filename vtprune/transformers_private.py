# SPDX-License-Identifier: Apache-2.0
"""The private side of transformers, and what differs between its releases. All else of this library asks here.

What transformers documents (models, configs, `generate()`, `DynamicCache`) is used where it is needed. What it does not
promise (argument names of decoders, mask factories, cache layers, the code around an attention function) stands below.
Names that take seconds to import, because they pull in the compiler, are imported where they are used: any loaded
model has done it already.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import sys
import textwrap
import threading
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import __version__ as VERSION
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from vtprune.errors import UnsupportedModelError, UnsupportedStageError, VTPruneError

__all__ = [
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "DynamicLayer",
    "LinearAttentionCacheLayerMixin",
]  # names of others that are asked for here; the rest is defined below

# -- releases ---------------------------------------------------------------------------------------------------------

OLDEST, NEWEST = (5, 18), (5, 24)
"""Minor releases of transformers that the tests run on."""


def _version() -> tuple[int, int]:
    major, minor = VERSION.split(".")[:2]
    return int(major), int(minor)


def releases() -> str:
    """The installed release and the tested ones, for messages."""
    (first, oldest), (last, newest) = OLDEST, NEWEST
    return f"installed is transformers {VERSION}, and vtprune is tested with {first}.{oldest} to {last}.{newest}"


def is_tested_release() -> bool:
    """Whether the installed release is one that the tests run on."""
    return OLDEST <= _version() <= NEWEST


def is_own(module: nn.Module) -> bool:
    """Whether the class of a model's part comes with transformers, and not from a checkpoint or another package."""
    return type(module).__module__.startswith("transformers.models.")


def check_release() -> None:
    """Raise UnsupportedModelError on a release that is too old; warn, once a process, on one that is not tested yet."""
    if _version() < OLDEST:
        raise UnsupportedModelError(f"this release of transformers is too old: {releases()}")
    if _version() > NEWEST:
        _warn_untested()


@functools.cache
def _warn_untested() -> None:
    warnings.warn(
        f"{releases()}; run `vtprune doctor` to see whether pruning is right with it", UserWarning, stacklevel=2
    )


# -- arguments of a decoder -------------------------------------------------------------------------------------------

_CACHE_NAMES = ("cache", "past_key_values")
CACHE = _CACHE_NAMES[0] if _version() >= (5, 24) else _CACHE_NAMES[1]
"""What the installed release calls a KV cache, as an argument and in what models return."""

_KNOWN_ARGUMENTS = {
    *_CACHE_NAMES,
    "attention_mask",
    "deepstack_visual_embeds",
    "hidden_states",
    "input_ids",
    "inputs_embeds",
    "mamba_attention_mask",
    "position_embeddings",
    "position_ids",
    "visual_pos_masks",
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
    if given is None and (parameter := _cache_parameter(decoder)) is not None:
        given = parameter.name
    if given is None:
        raise VTPruneError(f"{type(decoder).__name__} takes no KV cache under a name that is known: {releases()}")
    return {**kwargs, given: cache}


def _cache_parameter(decoder: nn.Module) -> inspect.Parameter | None:
    """The parameter of a decoder's forward that takes the KV cache."""
    parameters = inspect.signature(decoder.forward).parameters
    return next((parameters[name] for name in _CACHE_NAMES if name in parameters), None)


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


# -- kinds of layers and their caches ---------------------------------------------------------------------------------

ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of decoder layers that hold nothing but keys and values, one of each a token."""

_STATE_KINDS = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding"})
"""Kinds of decoder layers with a state that each token changes; "hybrid" ones hold keys and values, too."""


def layer_type(config: Any, layer: int) -> str:
    """Kind of a decoder layer, as transformers names it: "full_attention", "linear_attention", ..."""
    types = getattr(config, "layer_types", None)
    if types:
        return types[layer]
    return "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"


def state_kinds(config: Any, layers: int) -> list[str]:
    """Kinds of decoder layers that carry a state from token to token (convolutions, linear attention, Mamba), sorted.

    Raises UnsupportedModelError if a layer is of a kind that is not known.
    """
    kinds = {layer_type(config, layer) for layer in range(layers)} - ATTENTION_KINDS
    if strange := sorted(kinds - _STATE_KINDS):
        raise UnsupportedModelError(
            f"the language model {config.model_type!r} has layers of a kind that is not known: {', '.join(strange)}; "
            f"{releases()}"
        )
    return sorted(kinds)


def longest_prunable(config: Any, layers: int) -> int | None:
    """Length of the longest sequence in which tokens can go missing; None for any.

    Layers with chunks, or with queries scaled by how many tokens came before, would see other chunks and scales in a
    sequence that has been cut.
    """
    limits = []
    if any(layer_type(config, layer) == "chunked_attention" for layer in range(layers)):
        limits.append(config.attention_chunk_size)
    if getattr(config, "attn_temperature_tuning", False):
        limits.append(int(config.floor_scale) - 1)
    return min(limits, default=None)


def check_decoder(decoder: nn.Module) -> None:
    """Raise UnsupportedModelError if a language model has a class of its own for its KV cache."""
    parameter = _cache_parameter(decoder)
    for cls in typing.get_args(parameter and parameter.annotation):
        if isinstance(cls, type) and issubclass(cls, Cache) and cls not in (Cache, DynamicCache):
            raise UnsupportedModelError(
                f"a {type(decoder).__name__} keeps its KV cache in a {cls.__name__}, in which tokens cannot go missing"
            )


def is_paged(cache: Any) -> bool:
    """Whether a KV cache is one of pages that many requests share (continuous batching), without layers of its own."""
    return not isinstance(cache, Cache)


@functools.cache
def _replays_hooks() -> bool:
    """Whether gradient checkpointing runs a layer's hooks once more in the backward pass, as older releases do."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" in vars(GradientCheckpointingLayer)


def is_checkpointed(layer: nn.Module) -> bool:
    """Whether a decoder layer is under gradient checkpointing now, and leaves the KV cache that it is given alone."""
    on = getattr(layer, "gradient_checkpointing", False) and layer.training
    return on and (torch.is_grad_enabled() or _replays_hooks())


def check_replay(layer: nn.Module) -> None:
    """Raise UnsupportedStageError if hooks of a decoder layer would run once more when their call is over."""
    if is_checkpointed(layer) and torch.is_grad_enabled() and _replays_hooks():
        raise UnsupportedStageError(
            "this release of transformers runs the hooks of decoder layers once more under gradient checkpointing, "
            "when what was pruned between them is gone; turn it off, use a method before the LLM, or a newer "
            f"release: {releases()}"
        )


def has_keys(layer: Any) -> bool:
    """Whether a cache layer holds keys and values; those of convolutions and linear attention hold a state instead."""
    return isinstance(layer, CacheLayerMixin)


def is_prunable(layer: Any) -> bool:
    """Whether tokens can go missing in a cache layer: one that grows, or that holds no tokens at all."""
    if has_keys(layer):
        return not layer.is_compileable
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def create_missing_layers(cache: Cache, count: int) -> None:
    """Create the layers of a cache that transformers would create lazily."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < count:
            cache.layers.append(cache.layer_class_to_replicate())
        cache.layer_class_to_replicate = None


def is_plain_layer(layer: Any) -> bool:
    """Whether a cache layer keeps its keys and values as two tensors, all of them, unquantised."""
    return type(layer) is DynamicLayer


# -- masks ------------------------------------------------------------------------------------------------------------


def layer_mask(
    config: Any,
    kind: str,
    hidden: Tensor,
    padding: Tensor | None,
    cache: Cache | None,
    layer: int,
    blocks: Tensor | None,
    window_cuts_blocks: bool,
) -> Any:
    """Attention mask of a decoder layer in the form that its attention back end wants.

    hidden: (batch, n, dim), what enters the layer. padding: (batch, columns) bool or None. blocks: (batch, columns)
    long, columns of one block see one another both ways; None for none. window_cuts_blocks: whether a sliding window
    also limits what a column sees of its own block.
    """
    from transformers import masking_utils as private

    factories = private.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
    factory: Any = factories[kind]
    # The factory of chunks takes blocks from 5.20 on only.
    deviation = {} if blocks is None else {"block_sequence_ids": blocks}
    if blocks is not None and kind == "sliding_attention" and window_cuts_blocks:
        # The factory of sliding masks would let tokens see their whole block.
        factory = factories["full_attention"]
        deviation = {
            "or_mask_function": private.blockwise_overlay(blocks),
            "and_mask_function": private.sliding_window_overlay(config.sliding_window),
        }
    return factory(
        config=config,
        inputs_embeds=hidden,
        attention_mask=padding,
        layer_idx=layer,
        **{CACHE: cache},
        **deviation,
    )


def encoder_mask(config: Any, hidden: Tensor, padding: Tensor) -> Any:
    """Attention mask of a vision encoder's layer over `padding` (batch, n) bool."""
    from transformers.masking_utils import create_bidirectional_mask

    return create_bidirectional_mask(config=config, inputs_embeds=hidden, attention_mask=padding)


def unmasked_steps(config: Any) -> bool:
    """Whether a single token on an unpadded cache is computed without a mask by the model's attention back end."""
    back_end = attention_back_end(config)
    return back_end == "sdpa" or "flash" in back_end


def attention_back_end(config: Any) -> str:
    """Name of the attention back end of a model: "sdpa", "eager", "flash_attention_2", ..."""
    return config._attn_implementation


# -- positions --------------------------------------------------------------------------------------------------------


def rotary_embedding(decoder: nn.Module, layer: int, hidden: Tensor, positions: Tensor) -> Any:
    """What a decoder hands one of its layers as `position_embeddings` at positions ([axes,] batch, n).

    hidden: gives the device and dtype. Usually cos and sin, (batch, n, rotary dim) each. Some models rotate each kind
    of layer in its own way.
    """
    embedding = getattr(decoder, "rotary_emb", None)
    if embedding is None:
        raise UnsupportedModelError(
            f"a {type(decoder).__name__} has no rotary position embedding, so it cannot be pruned"
        )
    if "layer_type" in _parameters(type(embedding)):
        return embedding(hidden, positions, layer_type(decoder.config, layer))
    return embedding(hidden, positions)


def uses_mrope(config: Any) -> bool:
    """Whether positions of a language model have several axes (M-RoPE)."""
    return "mrope_section" in (getattr(config, "rope_parameters", None) or {})


# -- the attention of one decoder layer -------------------------------------------------------------------------------

_CAPTURE = "vtprune_capture"
"""Name of the attention function that hands out what it is called with."""
_CALLS = "vtprune_calls"
"""Attribute of a replica of an encoder's attention module: a list of what its attention function was called with."""
_LOCK, _captures = threading.Lock(), 0

_HARMLESS = {"dropout", "is_causal", "position_ids", "scaling", "sliding_window", "softcap", "s_aux"}
"""Arguments of attention functions that are read here, or that say nothing about scores."""


@dataclass(frozen=True)
class Scored:
    """What a decoder layer computes attention scores from, positions and norms applied."""

    queries: Tensor
    """(batch, heads, n, head dim)"""
    keys: Tensor
    """(batch, kv heads, n, head dim)"""
    scale: float
    softcap: float | None
    """Bound of the scores; None for none."""
    sinks: Tensor | None
    """(heads,) logits that take part in every softmax and stand for no token; None for none."""


class _Captured(Exception):
    def __init__(self, scored: Scored):
        self.scored = scored


def _capture(module, query, key, value, attention_mask, *, scaling=None, softcap=None, s_aux=None, **kwargs):
    if _CALLS in module.__dict__:
        return _note(module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, s_aux=s_aux, **kwargs)
    strange = [name for name, given in kwargs.items() if name not in _HARMLESS and given is not None]
    if strange:
        raise UnsupportedStageError(f"its attention function takes {', '.join(sorted(strange))}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    raise _Captured(Scored(query, key, scale, softcap, s_aux))


def _note(module, query, key, value, attention_mask, *, scaling=None, **kwargs):
    # Towers hand on arguments of the whole model that say nothing here, so only what changes scores is looked for.
    strange = [name for name in ("softcap", "s_aux", "sliding_window") if kwargs.get(name) is not None]
    if strange or kwargs.get("is_causal"):
        names = strange or ["is_causal"]
        raise UnsupportedStageError(f"the vision encoder's attention function takes {', '.join(names)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    module.__dict__[_CALLS].append(EncoderScores(query, key, scale, attention_mask))
    return value.transpose(1, 2), None


class _Given(nn.Module):
    """Stands in for a projection whose output is known."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output

    def forward(self, hidden: Tensor) -> Tensor:
        return self.output


def _replica(module: nn.Module, attention: str, **children: nn.Module) -> nn.Module:
    """A copy of a module that shares its weights, with another attention function and some other children."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {**module._modules, **children}
    twin.config = copy.copy(module.config)
    # The property would also reach the sub-configs, which are shared.
    twin.config._attn_implementation_internal = attention
    return twin


def _run(attention: nn.Module, hidden: Tensor, rope: Any, positions: Tensor, mask: Tensor | None) -> Any:
    """The forward pass of a replica of an attention module."""
    # The module's own `forward` may be one that accelerate has put on the original.
    forward = type(attention).forward
    more = {"position_ids": positions} if "position_ids" in _parameters(type(attention)) else {}
    return forward(attention, hidden, position_embeddings=rope, attention_mask=mask, **more)


@functools.cache
def _parameters(cls: type) -> frozenset[str]:
    return frozenset(inspect.signature(cls.forward).parameters)


def reads_positions(layer: nn.Module) -> bool:
    """Whether a module inside a decoder layer works with position ids: some scale their queries by them."""
    # Layers themselves all take them, to hand them on.
    return any(_works_with_positions(type(module)) for module in layer.modules() if module is not layer)


@functools.cache
def _works_with_positions(cls: type) -> bool:
    """Whether the forward of a class does more with position ids than hand them to its attention function."""
    if "position_ids" not in _parameters(cls):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))
    except (OSError, SyntaxError):
        return True
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "position_ids"]
    handed_on = [
        keyword.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "attention_interface"
        for keyword in call.keywords
    ]
    return any(node not in handed_on for node in names)


@contextmanager
def _capturing() -> Iterator[None]:
    """While it lasts, transformers knows the attention function that captures. Sessions in several threads share it."""
    from transformers import AttentionInterface

    global _captures
    with _LOCK:
        _captures += 1
        AttentionInterface.register(_CAPTURE, _capture)
    try:
        yield
    finally:
        with _LOCK:
            _captures -= 1
            if not _captures:
                del AttentionInterface._global_mapping[_CAPTURE]


def scored(
    attention: nn.Module,
    queries: Tensor | None,
    keys: Tensor | None,
    rope: Any,
    positions: Tensor,
    *,
    norms: bool = True,
) -> Scored:
    """Put a decoder layer's queries and keys through the layer's own norms and rotation.

    The layer's own code does it, up to the call of its attention function, so that no rotation, norm or sink has to be
    known here.

    Args:
        attention: the layer's attention module.
        queries: (batch, n, heads * head dim), output of `q_proj`; None if only the keys are of interest.
        keys: (batch, n, kv heads * head dim), output of `k_proj`; None if only the queries are.
        rope: what the language model hands its layers as `position_embeddings`, for n columns.
        positions: (batch | 1, n) position ids.
        norms: whether queries and keys are normalised, where the layer does so.

    Raises UnsupportedStageError if the layer does not work that way.
    """
    hidden = keys if queries is None else queries
    given = {"q_proj": queries, "k_proj": keys, "v_proj": None}
    children: dict[str, nn.Module] = {
        name: _Given(_zeros(attention, name, hidden, rope) if output is None else output)
        for name, output in given.items()
        if name in attention._modules
    }
    if not norms:
        children |= {name: nn.Identity() for name in attention._modules if "norm" in name}
    twin = _replica(attention, _CAPTURE, **children)
    try:
        with _capturing():
            _run(twin, hidden, rope, positions, None)
    except _Captured as captured:
        return captured.scored
    raise UnsupportedStageError(f"{type(attention).__name__} calls no attention function of transformers")


@dataclass(frozen=True)
class EncoderScores:
    """What one call of an encoder's attention function computes scores from, positions and norms applied."""

    queries: Tensor
    """(sequences, heads, tokens, head dim)"""
    keys: Tensor
    """(sequences, heads, tokens, head dim)"""
    scale: float
    mask: Tensor | None
    """As the attention function takes it: None, (sequences, tokens) for keys, or (sequences, 1, tokens | 1, tokens)
    bool or additive."""

    def visible(self, first: int, last: int) -> Tensor | None:
        """(sequences, 1, rows | 1, tokens) bool: what the queries `first` to `last` - 1 may attend to; None: all."""
        if self.mask is None:
            return None
        if self.mask.ndim == 2:
            return self.mask.bool()[:, None, None]
        rows = self.mask if self.mask.shape[2] == 1 else self.mask[:, :, first:last]
        return rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2

    @property
    def real(self) -> Tensor | None:
        """(sequences, tokens) bool: tokens that any query may attend to, so no padding; None: all."""
        visible = self.visible(0, self.queries.shape[2])
        return None if visible is None else visible.any(2)[:, 0]

    def split(self, lengths: Sequence[int]) -> list[EncoderScores]:
        """A packed sequence as one call for each image in it, where it is one: attention does not cross images."""
        if len(self.queries) > 1 or len(lengths) < 2 or sum(lengths) != self.queries.shape[2]:
            return [self]
        parts, start = [], 0
        for length in lengths:
            own = slice(start, start + length)
            mask = self.mask
            if mask is not None:
                mask = mask[..., own] if mask.ndim == 2 or mask.shape[2] == 1 else mask[:, :, own, own]
            parts.append(EncoderScores(self.queries[:, :, own], self.keys[:, :, own], self.scale, mask))
            start += length
        return parts


_PROJECTIONS = (("q_proj", "k_proj"), ("qkv",))
"""Names under which towers of transformers project to queries and keys."""


def query_key_projections(attention: nn.Module) -> tuple[str, ...]:
    """Names of the children of an encoder's attention module that project to queries and keys.

    Raises UnsupportedStageError if it has none that are known.
    """
    for names in _PROJECTIONS:
        if all(name in attention._modules for name in names):
            return names
    raise UnsupportedStageError(
        f"the attention of this vision encoder cannot be recomputed: {type(attention).__name__} has none of the "
        f"projections {', '.join(' and '.join(names) for names in _PROJECTIONS)}"
    )


def encoder_scores(
    attention: nn.Module,
    projected: Mapping[str, Tensor],
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    rotated: bool = True,
) -> list[EncoderScores]:
    """Put an encoder layer's queries and keys through the layer's own norms and rotation, as `scored` does.

    One for each call of its attention function: modules that pack images, or attend within windows, make one for each
    image or window, in the order of the tokens.

    Args:
        attention: the layer's attention module.
        projected: name of a projection (see `query_key_projections`) -> its output.
        args, kwargs: what the module was called with.
        rotated: whether queries and keys are rotated, where the layer does so.
    """
    children: dict[str, nn.Module] = {name: _Given(output) for name, output in projected.items()}
    if "v_proj" in attention._modules:  # values are as wide as keys, and nothing is read of them
        keys = projected["k_proj"]
        children["v_proj"] = _Given(keys.new_zeros(()).expand(keys.shape))
    # What comes behind the attention function costs time and says nothing.
    children |= {
        name: nn.Identity()
        for name, child in attention._modules.items()
        if name not in children and isinstance(child, nn.Linear)
    }
    twin = _replica(attention, _CAPTURE, **children)
    calls = twin.__dict__[_CALLS] = []
    if not rotated and kwargs.get("position_embeddings") is not None:
        cos, sin = kwargs["position_embeddings"]
        kwargs = {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}
    with torch.no_grad(), _capturing():
        type(attention).forward(twin, *args, **kwargs)
    if not calls:
        raise UnsupportedStageError(f"{type(attention).__name__} calls no attention function of transformers")
    return calls


@contextmanager
def eager_encoder_attention(attention: nn.Module) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
    """While it lasts, weights and mask of each call of the eager attention function by an encoder's attention module.

    The module has to run with the eager back end. Not for several threads at a time.
    Raises UnsupportedStageError if the module's file has no such function.
    """
    home = sys.modules[type(attention).__module__]
    eager = getattr(home, "eager_attention_forward", None)
    if eager is None:
        raise UnsupportedStageError(f"{home.__name__} has no eager attention function")
    calls: list[tuple[Tensor, Tensor | None]] = []

    def note(module, query, key, value, attention_mask=None, **kwargs):
        output = eager(module, query, key, value, attention_mask, **kwargs)
        if module is attention:
            calls.append((output[1], attention_mask))
        return output

    home.eager_attention_forward = note
    try:
        yield calls
    finally:
        home.eager_attention_forward = eager


def output_width(attention: nn.Module, projection: str) -> int:
    """Width of the output of `q_proj`, `k_proj` or `v_proj`."""
    width = getattr(getattr(attention, projection), "out_features", None)
    if width is not None:
        return width
    # Not every quantised layer says so.
    config = attention.config
    return attention.head_dim * (config.num_attention_heads if projection == "q_proj" else config.num_key_value_heads)


def _zeros(attention: nn.Module, projection: str, like: Tensor, rope: Any) -> Tensor:
    """Zeros in the shape of a projection's output for as many columns as there are in `like`."""
    shape = (*like.shape[:2], output_width(attention, projection))
    if torch.is_tensor(rope) and rope.is_complex():  # such rotations need contiguous numbers
        return like.new_zeros(shape)
    return like.new_zeros(()).expand(shape)  # without memory of their own


def eager_weights(attention: nn.Module, hidden: Tensor, rope: Any, positions: Tensor) -> Tensor:
    """(batch, heads, n, n) causal attention weights of a decoder layer, by the layer's own eager code.

    hidden: (batch, n, dim), what enters the attention module. The model itself is not touched.
    """
    n = hidden.shape[1]
    mask = hidden.new_full((n, n), torch.finfo(hidden.dtype).min).triu(1)[None, None]
    twin = _replica(attention, "eager")
    weights = _run(twin, hidden, rope, positions, mask)[1]
    if weights is None:
        raise UnsupportedStageError(f"{type(attention).__name__} gives no attention weights")
    return weights


def attention_input(layer: nn.Module, hidden: Tensor, rope: Any, positions: Tensor) -> Tensor:
    """What a decoder layer hands its attention module for an input `hidden` (batch, n, dim); same shape."""
    caught: list[Tensor] = []

    class Catch(nn.Module):
        def forward(self, *args, **kwargs):
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise _Captured(None)

    twin = copy.copy(layer)
    twin.__dict__["_modules"] = {**layer._modules, "self_attn": Catch()}
    try:
        type(layer).forward(twin, hidden, position_embeddings=rope, attention_mask=None, position_ids=positions)
    except _Captured:
        return caught[0]
    raise UnsupportedStageError(f"{type(layer).__name__} does not call its attention module")


# -- single functions of single models --------------------------------------------------------------------------------


def gemma3_blocks(token_types: Tensor) -> Tensor:
    """(batch, n) token types of Gemma 3 -> (batch, n) long: the image of each token, -1 for none."""
    from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

    return get_block_sequence_ids_for_mask(token_types)


def llava_next_crops(size: Sequence[int], pinpoints: Any, tile: int) -> int:
    """How many crops LLaVA-NeXT makes of an image of a (height, width), the overview included."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return image_size_to_num_patches(size, pinpoints, tile)


def qwen2_5_vl_window_order(grids: Tensor, vision_config: Any) -> Tensor:
    """(merged tokens,) long: the order in which Qwen2.5-VL's encoder sorts the merged tokens of (media, 3) grids."""
    from transformers.vision_utils import get_vision_window_index

    order, _ = get_vision_window_index(
        grids, vision_config.spatial_merge_size, vision_config.window_size, vision_config.patch_size
    )
    return order


# -- loading ----------------------------------------------------------------------------------------------------------


def uninitialised() -> AbstractContextManager:
    """While it lasts, models are made without filling their weights."""
    from transformers.initialization import no_init_weights

    return no_init_weights()


def commit_of(config: Any) -> str | None:
    """The commit of the hub's snapshot that a config was read from; None for a folder."""
    return config._commit_hash
