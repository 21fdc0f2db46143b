# SPDX-License-Identifier: Apache-2.0
"""What methods are shown: visual tokens, and the signals that they list, on one device."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from vtprune.adapters.base import Adapter
from vtprune.devices import send
from vtprune.errors import ConfigError, UnsupportedStageError
from vtprune.methods.base import AfterPrefill, BeforeLLM, InLLM, Method
from vtprune.methods.schedules import Reviving
from vtprune.signals import CacheSignal, EncoderSignal, LastQueryAttention, LayerSignal, Taps
from vtprune.stages.layout import Groups
from vtprune.tokens import ModelShape, Selection, VisualTokens

Chooser = Callable[[Method, VisualTokens], Selection]
"""How a stage asks a method to choose."""


def check_signals(method: Method, shape: ModelShape) -> None:
    """Raise unless every signal in `signals` of a method of one stage can be read there; nothing is computed."""
    signals = method.signals(shape)
    kind = next((kind for stage, kind in _KINDS.items() if isinstance(method, stage)), None)
    for signal in signals:
        name = f"{method.name}: {type(signal).__name__}"
        if not isinstance(signal, EncoderSignal | LayerSignal | CacheSignal):
            raise ConfigError(f"{name} is no signal; see `vtprune.signals`")
        if isinstance(signal, EncoderSignal) and not shape.has_cls and signal.taps(shape).cls_rows:
            raise UnsupportedStageError(f"{name} needs a CLS token, and this vision encoder has none")
        if kind is None or not isinstance(signal, kind):
            # What a signal inside the LLM reads of the encoder is listed, so that it is recorded.
            if isinstance(method, InLLM) and isinstance(signal, EncoderSignal):
                continue
            raise UnsupportedStageError(f"{name} cannot be read {_WHERE[kind]}")
        if isinstance(method, Reviving) and not isinstance(signal, LastQueryAttention):
            raise UnsupportedStageError(f"{name} cannot be read while tokens are generated; LastQueryAttention can")
        if isinstance(method, InLLM):
            _check_layers(name, method, signal, shape)
            if signal.measures() and type(signal).measure is LayerSignal.measure:
                raise ConfigError(f"{name} lists layers in `measures`, and does not override `measure`")


def check_family(method: Method, adapter: Adapter) -> None:
    """Raise UnsupportedStageError if a method of one stage needs what an adapter says that its family lacks."""
    if method.needs_grid and adapter.gridless:
        raise UnsupportedStageError(
            f"{method.name} goes by rows and columns, and the visual tokens of {adapter.family} have none: "
            f"{adapter.gridless}; methods that need none work: divprune, cdpruner"
        )
    for signal in method.signals(adapter.shape):
        taps = signal.taps(adapter.shape) if isinstance(signal, EncoderSignal) else Taps()
        of_layers = taps.cls_rows or taps.received or taps.keys or taps.outputs
        reason = (of_layers and adapter.layers_unread) or (taps.projector_input and adapter.features_unread)
        if reason:
            raise UnsupportedStageError(
                f"{method.name}: {type(signal).__name__} cannot be read of the vision encoder of {adapter.family}: "
                f"{reason}; methods that read nothing of it work: divprune, cdpruner"
            )


def _check_layers(name: str, method: InLLM, signal: LayerSignal, shape: ModelShape) -> None:
    """Raise unless the layers that a signal reads have run by some cut."""
    cuts = method.cuts(shape)
    for layer in {layer for cut in cuts for layer in signal.attends(cut)} | set(signal.measures()):
        if not 0 <= layer < max(cuts, default=0):
            raise ConfigError(f"{name} reads decoder layer {layer}, and the cuts are on the input of layers {cuts}")


_KINDS: dict[type[Method], type] = {BeforeLLM: EncoderSignal, InLLM: LayerSignal, AfterPrefill: CacheSignal}
_WHERE = {
    EncoderSignal: "before the LLM",
    LayerSignal: "inside the LLM",
    CacheSignal: "after the prefill",
    None: "inside the vision encoder",
}


def visual_tokens(
    method: Method, shape: ModelShape, groups: Groups, features: Tensor, read: Callable[[Any], Any], **facts: Any
) -> VisualTokens:
    """What a method is shown of groups of visual tokens, all on the device of their features (groups, tokens, dim).

    read: gives a signal. facts: further fields of `VisualTokens`.
    """
    device = features.device
    return VisualTokens(
        features=features,
        valid=groups.on(device).valid,
        signals=signal_reader(method, shape, read, device),
        shape=shape,
        **{name: _on(device, fact) if torch.is_tensor(fact) else fact for name, fact in facts.items()},
    )


def signal_reader(
    method: Method, shape: ModelShape, read: Callable[[Any], Any], device: torch.device
) -> Callable[[Hashable], Any]:
    """What `VisualTokens.signals` looks up for a method: `read` of a signal that the method lists, on a device."""
    listed = frozenset(method.signals(shape))

    def look_up(signal: Hashable) -> Any:
        if signal not in listed:
            raise ConfigError(f"{method.name} reads {signal}, which its `signals` does not list")
        return _on(device, read(signal))

    return look_up


def _on(device: torch.device, value: Any) -> Any:
    if torch.is_tensor(value):
        return send(value, device)
    return type(value)(_on(device, part) for part in value) if isinstance(value, tuple | list) else value
