# SPDX-License-Identifier: Apache-2.0
"""Models with one fault each, of the kinds that a release of transformers or a text model brings."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from vtprune import session_life
from vtprune.transformers_private import StaticCache, cache_of, with_cache


def takes_cache_under_another_name(model: nn.Module) -> None:
    """The decoder is called with its KV cache as `kv_store`, as 5.24 calls `cache` what was `past_key_values`."""
    decoder = model.get_decoder()

    class Renamed(type(decoder)):
        def __call__(self, *args, **kwargs):
            name = next(name for name in ("cache", "past_key_values") if name in kwargs)
            return super().__call__(*args, kv_store=kwargs.pop(name), **kwargs)

        def forward(self, *args, kv_store=None, **kwargs):
            # What `super()` takes it as, which the hooks never see.
            return super().forward(*args, **with_cache(self._plain, kwargs, kv_store))

    object.__setattr__(decoder, "_plain", _Signature(type(decoder)))
    decoder.__class__ = Renamed


class _Signature:
    """Stands for a decoder as it was, for whoever asks what it takes."""

    def __init__(self, cls: type):
        self.forward = cls.forward


def ignores_padding(model: nn.Module) -> None:
    """A padded batch sees its padding."""

    def hook(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        if mask is not None and len(mask) > 1:
            return args, {**kwargs, "attention_mask": torch.ones_like(mask)}
        return None

    model.model.register_forward_pre_hook(hook, with_kwargs=True)


def spoils_cached_keys(model: nn.Module) -> None:
    """Each generated token finds the keys in the cache a little larger, in a session only."""

    def hook(module, args, kwargs):
        cache = cache_of(kwargs)
        if session_life.ACTIVE and cache is not None and cache.get_seq_length():
            for layer in cache.layers:
                layer.keys = layer.keys * 1.01

    model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)


def forgets_where_a_turn_begins(model: nn.Module) -> None:
    """Several tokens on a cache get positions that are too late, in a session only."""

    def hook(module, args, kwargs):
        late = session_life.ACTIVE and cache_of(kwargs) is not None and cache_of(kwargs).get_seq_length()
        if late and kwargs["inputs_embeds"].shape[1] > 1:
            return args, {**kwargs, "position_ids": kwargs["position_ids"] + 7}
        return None

    model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)


def adds_a_little(model: nn.Module) -> None:
    """Logits move in the last bits, in a session only."""
    model.lm_head.register_forward_hook(lambda m, args, out: out * (1 + 1e-6) if session_life.ACTIVE else None)


def spoils_static_caches(model: nn.Module) -> None:
    """What is generated finds the keys in a static cache a little larger, in a session only."""

    def hook(module, args, kwargs):
        cache = cache_of(kwargs)
        if session_life.ACTIVE and isinstance(cache, StaticCache) and cache.get_seq_length():
            cache.layers[0].keys.mul_(1.01)

    model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)


def scales_what_leaves_the_decoder(model: nn.Module) -> None:
    """A step that the recompute does not know of."""

    def hook(module, args, output):
        output.last_hidden_state = output.last_hidden_state * 2
        return output

    model.get_decoder().register_forward_hook(hook)


def raises(model: nn.Module) -> None:
    def hook(module, args, output):
        raise ValueError("out of order")

    model.lm_head.register_forward_hook(hook)


def score_wrongly(monkeypatch) -> None:
    """Attention rows are computed with twice the scale, and nobody looks before a session."""
    import vtprune.attention
    import vtprune.certificate

    right = vtprune.attention.scored
    monkeypatch.setattr(vtprune.certificate, "check_attention", lambda *args, **kwargs: None)
    monkeypatch.setattr(vtprune.stages.in_llm, "check_attention", lambda *args, **kwargs: None, raising=False)

    def wrong(*args, **kwargs):
        scored = right(*args, **kwargs)
        return dataclasses.replace(scored, scale=2 * scored.scale)

    monkeypatch.setattr(vtprune.attention, "scored", wrong)
