# SPDX-License-Identifier: Apache-2.0
"""`adapter="generic"`: a model without an adapter of its own, once pruning was compared with the model itself.

The certificate runs a padded batch of two prompts with an image each. Keeping everything must change no bit. With
tokens dropped before the language model, the prefill and a step on the pruned cache must give what the model's own
decoder gives for each prompt alone, without a cache, when the same columns are taken out of its input by hand.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.adapters import list_adapters
from vtprune.adapters.generic import Generic
from vtprune.adapters.wrappers import unwrapped
from vtprune.errors import UnsupportedModelError, UnsupportedStageError, VTPruneError
from vtprune.example_prompts import ExamplePrompts, example_prompts
from vtprune.methods import build_methods
from vtprune.methods.base import BeforeLLM, Method
from vtprune.session import Session
from vtprune.signals import SampleKeys
from vtprune.transformers_private import deepstack_of

GENERIC = "generic"
METHODS: tuple[dict[str, Any], ...] = (
    {"name": "uniform", "keep_ratio": 0.5, "positions": "original"},
    {"name": "random", "keep_ratio": 0.5, "positions": "compact"},
)
SHARE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest difference of a hidden state, as a share of the largest one."""
HALF_PRECISION = 0.05
"""The same for shorter floats."""
NOISE = 4.0
"""How many times the model's own difference between a padded batch and its samples alone is allowed."""

_CERTIFIED: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()
"""Model -> why it is refused; None if it is not."""


def generic_adapter(model: Any, methods: list[Method]) -> Generic:
    """The generic adapter of a model for some methods, once it has passed the certificate; a model is asked once.

    The model runs about ten short prompts, so it has to be on the device and in the dtype that it will be used in.

    Raises:
        UnsupportedModelError: the model has an adapter of its own, or the certificate found what is wrong.
        UnsupportedStageError: a method needs more than the projected features.
    """
    model = unwrapped(model)
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    if model_type in list_adapters():
        raise UnsupportedModelError(
            f"a {type(model).__name__} has an adapter of its own, which knows more; leave adapter={GENERIC!r} out"
        )
    adapter = Generic(model)
    _check_needs(methods, adapter)
    if model not in _CERTIFIED:
        _CERTIFIED[model] = _fault(adapter)
    if (fault := _CERTIFIED[model]) is not None:
        raise UnsupportedModelError(f"the generic adapter does not fit a {type(model).__name__}: {fault}")
    return adapter


def _check_needs(methods: list[Method], adapter: Generic) -> None:
    """Raise UnsupportedStageError unless methods need nothing but the projected features."""
    for part in (part for method in methods for part in method.parts(adapter.shape)):
        signals = [signal for signal in part.signals(adapter.shape) if not isinstance(signal, SampleKeys)]
        if not isinstance(part, BeforeLLM) or signals:
            what = f"reads {type(signals[0]).__name__}" if signals else f"acts in stage {part.stage!r}"
            raise UnsupportedStageError(
                f"{part.name} {what}, and the generic adapter is for methods that need the projected features only, "
                "before the LLM: divprune, random, uniform"
            )


@torch.no_grad()
def _fault(adapter: Generic) -> str | None:
    """Why pruning cannot be trusted on a model; None if nothing was found."""
    if any(parameter.is_meta for parameter in adapter.model.parameters()):
        return "it was built on paper, without weights, so nothing can be compared"
    training = adapter.model.training
    adapter.model.eval()
    try:
        with torch.random.fork_rng(devices=[] if adapter.model.device.type == "cpu" else [adapter.model.device]):
            return _compare(adapter, example_prompts(adapter))
    except VTPruneError as error:
        return str(error)
    except Exception as error:  # whatever a model that nobody has seen runs into
        return f"checking it failed: {type(error).__name__}: {error}"
    finally:
        adapter.model.train(training)


def _compare(adapter: Generic, prompts: ExamplePrompts) -> str | None:
    with _decoder_calls(adapter) as calls:
        for inputs in (prompts.together, *prompts.alone):
            _two_tokens(adapter, inputs)
    (_, plain), *alone = calls[::2]
    if any(torch.is_tensor(mask) and mask.ndim == 4 or isinstance(mask, dict) for mask in _masks(alone)):
        return "the model builds its own attention masks, so that image tokens may see one another"
    if any(deepstack_of(kwargs) for kwargs, _ in alone):
        return "features are added to its visual tokens in several layers"
    own = [plain[[sample], prompts.first_column(sample) :] for sample in range(2)]
    largest = max(float(states.abs().max()) for states in own)
    noise = max(float((a - b).abs().max()) for a, (_, b) in zip(own, alone, strict=True))
    share = SHARE.get(adapter.model.dtype, HALF_PRECISION)
    if noise > share * largest and share != HALF_PRECISION:
        return f"without vtprune a padded batch differs from its samples alone by {noise:.2g} of {largest:.2g}"
    allowed = max(share * largest, NOISE * noise)

    with _session(adapter, {"name": "uniform", "keep_ratio": 1.0}), _decoder_calls(adapter) as calls:
        _two_tokens(adapter, prompts.together)
        if not torch.equal(calls[0][1], plain):
            return "keeping everything does not give the model's own output"
    for method in METHODS:
        if (fault := _pruned(adapter, prompts, method, allowed)) is not None:
            return f"{method['name']}: {fault}"
    return None


def _pruned(adapter: Generic, prompts: ExamplePrompts, method: dict[str, Any], allowed: float) -> str | None:
    """What is wrong with a method's prefill and first step; None if nothing is."""
    model = adapter.model
    with _session(adapter, method) as session, _decoder_calls(adapter) as calls:
        output = _two_tokens(adapter, prompts.together)
        report = session.report
        (_, prefill), (_, step) = calls[0], calls[-1]
        choices = []
        for inputs in prompts.alone:
            _two_tokens(adapter, inputs)
            choices.append(session.report.kept(0, 0))
    for sample, inputs in enumerate(prompts.alone):
        first = prompts.first_column(sample)
        kept = report.kept(sample, 0) - first
        if not torch.equal(kept, choices[sample]):
            return "in a padded batch other tokens are kept than alone"
        ids = torch.cat([inputs["input_ids"], output[[sample], -2:-1]], 1)
        longer = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in inputs:
            types = inputs["mm_token_type_ids"]
            longer["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(types[:, :1])], 1)
        with _decoder_calls(adapter) as calls:
            model(**longer, use_cache=False)
            (kwargs, _) = calls.pop()
            visual = (ids[0] == adapter.visual_token_ids["image"]).cpu()
            columns = torch.arange(ids.shape[1])
            stay = columns[~visual | torch.isin(columns, kept)].to(ids.device)
            expected = _shortened(adapter, kwargs, stay, compact=method["positions"] == "compact")
        got = torch.cat([prefill[sample, first + stay[:-1]], step[sample, -1:]])
        worst = float((got - expected).abs().max())
        if not worst <= allowed:
            return (
                f"hidden states differ by {worst:.2g} (allowed {allowed:.2g}) from those of the model without the "
                "columns that were dropped"
            )
    return None


def _session(adapter: Generic, method: dict[str, Any]) -> Session:
    return Session(
        adapter.model, build_methods(method), strict=True, text=None, prompt_length=None, profile=False, adapter=adapter
    )


def _two_tokens(adapter: Generic, inputs: dict[str, Any]) -> Tensor:
    """(batch, length) ids of the prompts and two tokens more."""
    return adapter.model.generate(
        **inputs,
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        num_beams=1,
        suppress_tokens=list(adapter.visual_token_ids.values()),
    )


def _shortened(adapter: Generic, kwargs: dict[str, Any], stay: Tensor, *, compact: bool) -> Tensor:
    """(n, dim): what the decoder gives for some columns of a call of one sample."""
    positions = kwargs.get("position_ids")
    if compact or positions is None:
        places = torch.arange(len(stay), device=stay.device) if compact else stay
        positions = places.expand(*((1, 1) if positions is None else positions.shape[:-1]), -1)
    else:
        positions = positions[..., stay]
    positions = positions[0] if positions.ndim == 3 and len(positions) == 1 else positions
    # Without a mask transformers takes gaps in positions for the borders of packed sequences.
    real = torch.ones(1, len(stay), dtype=torch.long, device=stay.device)
    embeddings = kwargs["inputs_embeds"][:, stay]
    output = adapter.language_model(
        inputs_embeds=embeddings, position_ids=positions, attention_mask=real, use_cache=False
    )
    return output.last_hidden_state[0]


def _masks(calls: list[tuple[dict[str, Any], Tensor]]) -> Iterator[Any]:
    return (kwargs.get("attention_mask") for kwargs, _ in calls)


@contextmanager
def _decoder_calls(adapter: Generic) -> Iterator[list[tuple[dict[str, Any], Tensor]]]:
    """Takes down each call of the language model: its arguments, and its last hidden states (batch, length, dim)."""
    calls: list[tuple[dict[str, Any], Tensor]] = []

    def note(module, args, kwargs, output):
        calls.append((kwargs, output.last_hidden_state.detach().clone()))

    handle = adapter.language_model.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
