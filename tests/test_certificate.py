# SPDX-License-Identifier: Apache-2.0
"""Language models that nobody has tested are asked, before their first use, whether attention can be recomputed."""

from __future__ import annotations

import pytest
import torch
from conformance import models, text_models
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

import vtprune
from vtprune import certificate
from vtprune.errors import UnsupportedStageError

REFUSAL = "this method needs attention inside the LLM, which cannot be recomputed"


@pytest.fixture(autouse=True)
def _nothing_is_tested(monkeypatch):
    monkeypatch.setattr(certificate, "TESTED_TEXT_MODELS", frozenset())


class WithBias(LlamaAttention):
    """Adds to its scores what no attention function of transformers is told of."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        if attention_mask is not None:
            attention_mask = attention_mask + 3.0 * torch.arange(attention_mask.shape[-1]).remainder(2)
        return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)


class OnItsOwn(LlamaAttention):
    """Computes attention without any attention function of transformers."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        return self.o_proj(self.v_proj(hidden_states).repeat(1, 1, self.num_key_value_groups)), None


class TwiceNormed(nn.Module):
    """A norm before attention that is not all that stands before it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)

    def forward(self, hidden_states, **kwargs):
        return self.layer(2.0 * hidden_states + 1.0, **kwargs)


def with_attention(cls) -> nn.Module:
    config = LlamaConfig(**models.TEXT | dict(num_hidden_layers=4, num_key_value_heads=2, attn_implementation="eager"))
    model = models.with_text_tower(config, "eager")
    for layer in model.get_decoder().layers:
        layer.self_attn.__class__ = cls
    return model


@pytest.mark.parametrize("name", text_models.parameters(text_models.EVERYTHING))
def test_it_passes_where_rows_are_right(name):
    for method in ("fastv", {"name": "transprune", "score": "iga"}):
        vtprune.prune(text_models.shared(name), method, keep_ratio=0.7)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [(WithBias, "recomputed weights are off by"), (OnItsOwn, "calls no attention function of transformers")],
)
def test_what_differs_is_refused_by_name_and_the_rest_works(cls, reason):
    model = with_attention(cls)
    with pytest.raises(UnsupportedStageError, match=f"{REFUSAL} for a LlamaDecoderLayer .*{reason}"):
        vtprune.prune(model, "fastv", keep_ratio=0.7)
    with vtprune.prune(model, "divprune", keep_ratio=0.5) as session, torch.no_grad():
        model(**models.batch_of_three(model).inputs())
    assert session.report.keep_ratio < 0.6


def test_code_of_its_own_is_asked_whatever_it_calls_itself(monkeypatch):
    monkeypatch.setattr(certificate, "TESTED_TEXT_MODELS", frozenset({"llama"}))
    with pytest.raises(UnsupportedStageError, match=f"{REFUSAL} for a LlamaDecoderLayer"):
        vtprune.prune(with_attention(WithBias), "fastv", keep_ratio=0.7)
    monkeypatch.setattr(certificate, "_fault", lambda *args: "asked")
    vtprune.prune(with_attention(LlamaAttention), "fastv", keep_ratio=0.7)


def test_attention_that_is_not_given_the_norm_is_refused_where_that_matters():
    model = models.with_text_tower(
        LlamaConfig(**models.TEXT | dict(num_hidden_layers=4, num_key_value_heads=2)), "eager"
    )
    layers = model.get_decoder().layers
    for index, layer in enumerate(layers):
        layers[index] = TwiceNormed(layer)
    vtprune.prune(model, "fastv", keep_ratio=0.7)  # sees projections while they are computed
    with pytest.raises(UnsupportedStageError, match=f"{REFUSAL} for a TwiceNormed"):
        vtprune.prune(model, "transprune", keep_ratio=0.7)


def test_a_model_is_asked_once(monkeypatch):
    model, asked = with_attention(LlamaAttention), []
    fault = certificate._fault
    monkeypatch.setattr(certificate, "_fault", lambda *args: asked.append(args[1:]) or fault(*args))
    for _ in range(2):
        vtprune.prune(model, "fastv", layer=2, keep_ratio=0.7)
    assert asked == [(1, False)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats(dtype):
    vtprune.prune(text_models.shared("llama").to(dtype), "fastv", keep_ratio=0.7)
    text_models.shared.cache_clear()
    with pytest.raises(UnsupportedStageError, match="off by"):
        vtprune.prune(with_attention(WithBias).to(dtype), "fastv", keep_ratio=0.7)


def test_the_model_is_left_as_it_was_and_no_chance_is_drawn():
    model = with_attention(LlamaAttention)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state, modules = torch.get_rng_state(), {name: dict(m.__dict__) for name, m in model.named_modules()}
    vtprune.prune(model, "transprune", keep_ratio=0.7)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for name, module in model.named_modules():
        assert module.__dict__.keys() == modules[name].keys()
        assert module.__dict__.get("config") is modules[name].get("config")
    assert model.config.text_config._attn_implementation == "eager"
