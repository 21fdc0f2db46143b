# SPDX-License-Identifier: Apache-2.0
"""Tokens behind a pruned cache of a tiny LLaVA: what its language model and each decoder layer are called with."""

import contextlib

import pytest
import torch
from torch import nn

from vtprune.testing import families
from vtprune.transformers_private import CACHE, layer_mask, step_mask

from .hand_made import ScriptedBefore, ScriptedInside
from .test_model_calls import following, single

CUTS = (2, 5)
TWICE = ((range(18),), (range(6),))
"""What is kept of an image at two cuts."""
HALVES = (range(18), range(20), range(9))
"""What is kept of three samples, of which the second has two images."""


@pytest.fixture(autouse=True)
def _fast(one_thread):
    with torch.no_grad():
        yield


@contextlib.contextmanager
def behind_a_prefill(method, inputs, name="llava", **overrides):
    """Gives what makes a call with so many tokens: it returns the cache and the arguments of the language model and of
    each decoder layer."""
    model = families.shared(name) if not overrides else families.build(name, **overrides)
    with following(method, model=model) as (calls, _):
        cache = model(**inputs, use_cache=True)[CACHE]
        mask, decoder = inputs["attention_mask"], model.get_decoder()

        def go_on(count=1, padding=(), positions=None):
            nonlocal mask
            mask = nn.functional.pad(mask, (0, count), value=1)
            for row, column in padding:
                mask[row, column] = 0
            noted = []
            with contextlib.ExitStack() as hooks:
                for module in (decoder, *decoder.layers):
                    hooks.enter_context(_noting(module, noted))
                ids = torch.full((len(mask), count), 7)
                if positions is None:
                    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -count:]
                model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **{CACHE: cache})
            return cache, noted[0], noted[1:]

        yield go_on, calls, decoder


@contextlib.contextmanager
def _noting(module, noted):
    handle = module.register_forward_pre_hook(lambda module, args, kwargs: noted.append(kwargs), with_kwargs=True)
    yield
    handle.remove()


INSIDE = ScriptedInside(keeps=TWICE, layers=CUTS, positions="original")


@pytest.mark.parametrize("method", [ScriptedBefore(keeps=((range(18),),), positions="original"), INSIDE])
def test_a_token_at_its_own_position_needs_nothing(method):
    with behind_a_prefill(method, single()) as (go_on, calls, _):
        for length in (46, 47):
            _, decoder, layers = go_on()
            assert calls._in_llm.now.continuation is None
            assert decoder["position_ids"].tolist() == [[length - 3]] and decoder["attention_mask"] is None
            assert all(layer["attention_mask"] is None for layer in layers)
            assert all(layer["position_embeddings"] is layers[0]["position_embeddings"] for layer in layers)


def test_compact_positions_of_one_length_are_those_of_the_whole_model():
    method = ScriptedBefore(keeps=((range(18),),), positions="compact")
    with behind_a_prefill(method, single()) as (go_on, calls, _):
        for position in (25, 26):
            _, decoder, _ = go_on()
            assert decoder["position_ids"].tolist() == [[position]] and decoder["attention_mask"] is None
            assert calls._in_llm.now.continuation is None


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("rope_type", ["default", "dynamic"])
def test_compact_positions_of_several_lengths_are_each_layers_own(count, rope_type):
    """Rotations of some kinds depend on the longest sequence, so that each is made by itself."""
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    method = ScriptedInside(keeps=TWICE, layers=CUTS, positions="compact")
    with behind_a_prefill(method, single(), rope_parameters=rope) as (go_on, _, decoder):
        made = []
        with _counting(decoder.rotary_emb, made):
            _, _, layers = go_on(count)
        assert len(made) == (2 if rope_type == "default" else 3)
        for i, layer in enumerate(layers):
            first = 43 - 18 * (i >= 2) - 12 * (i >= 5)
            positions = torch.arange(first, first + count)[None]
            expected = decoder.rotary_emb(torch.zeros(1, 1), positions)
            assert all(map(torch.equal, layer["position_embeddings"], expected))


@contextlib.contextmanager
def _counting(module, made):
    handle = module.register_forward_hook(lambda *call: made.append(call))
    yield
    handle.remove()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_beside_padding_each_length_has_a_mask(attention):
    inputs = families.batch("llava", families.shared("llava"), samples=3).inputs
    method = ScriptedInside(keeps=(HALVES, (range(5), range(6), range(7))), layers=CUTS, positions="original")
    with behind_a_prefill(method, inputs, attention=attention) as (go_on, _, decoder):
        for _ in range(2):
            cache, outer, layers = go_on()
            assert outer["attention_mask"].shape == (3, cache.get_seq_length())
            assert len({id(layer["attention_mask"]) for layer in layers}) == 3
            for i, layer in enumerate(layers):
                real = cache.layers[i].layout.real
                assert real.shape[1] == cache.layers[i].physical
                seen = layer["attention_mask"].expand(-1, 1, 1, -1)[:, 0, 0]
                assert torch.equal(seen if attention == "sdpa" else seen == 0, real)


def test_the_mask_of_one_token_is_what_the_factory_makes():
    model = families.shared("llava")
    config, real = model.get_decoder().config, torch.tensor([[False, True, True], [True, True, True]])
    made = layer_mask(config, "full_attention", torch.zeros(2, 3, 8), real, None, 0, None, False)
    assert torch.equal(step_mask(config, "full_attention", real)[:, 0, 0], made[:, 0, -1])
    assert step_mask(config, "sliding_attention", real) is None


def test_padding_in_a_later_turn_is_hidden_in_every_layer():
    inputs = families.batch("llava", families.shared("llava"), samples=3).inputs
    with behind_a_prefill(ScriptedInside(keeps=(HALVES,), positions="original"), inputs) as (go_on, _, _):
        go_on()
        cache, _, layers = go_on(2, padding=[(1, -2)])
        for i, layer in enumerate(layers):
            assert not layer["attention_mask"][1, 0, -1, -2] and layer["attention_mask"][0, 0, -1, -2]
            assert cache.layers[i].layout.real[1, -2:].tolist() == [False, True]


def test_tokens_behind_padding_on_the_right_count_on_from_the_last_token():
    """Callers count on from the last column."""
    inputs = families.batch("llava", families.shared("llava"), samples=3).inputs
    with behind_a_prefill(ScriptedInside(keeps=(HALVES,), positions="original"), inputs) as (go_on, _, _):
        first = (inputs["attention_mask"].sum(1, keepdim=True)).tolist()
        two, token = torch.arange(2) + torch.tensor(first), torch.tensor(first) + 2
        cache, _, _ = go_on(2, padding=[(1, -1)], positions=two)
        assert all(layer.layout.shift.tolist() == [[0], [1], [0]] for layer in cache.layers)
        _, outer, _ = go_on(1, positions=token)
        assert outer["position_ids"].tolist() == (token - torch.tensor([[0], [1], [0]])).tolist()


def test_axes_of_positions_are_moved_alike():
    name = "qwen2_5_vl"
    model = families.shared(name)
    inputs = dict(families.batch(name, model, samples=1).inputs)
    count = int((inputs["input_ids"] == model.config.image_token_id).sum())
    method = ScriptedInside(keeps=((range(count - 3),), (range(2),)), layers=CUTS, positions="compact")
    with behind_a_prefill(method, inputs, name=name) as (go_on, _, decoder):
        given = inputs["attention_mask"].sum().expand(3, 1, 1)
        cache, outer, layers = go_on()
        shifts = [0 if layer.layout.shift is None else int(layer.layout.shift) for layer in cache.layers]
        assert len(set(shifts)) == 3 and outer["position_ids"].unique().tolist() == [int(given[0]) - shifts[0]]
        for shift, layer in zip(shifts, layers, strict=True):
            expected = decoder.rotary_emb(torch.zeros(1, 1), given - shift)
            assert all(map(torch.equal, layer["position_embeddings"], expected))
