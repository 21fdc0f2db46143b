# SPDX-License-Identifier: Apache-2.0
"""Promise 2 on other language models below the same vision tower: norms on queries and keys, scaled embeddings, scaled
rotary positions; and a clear refusal where attention rows cannot be recomputed."""

import pytest
import torch
from transformers import GemmaConfig, LlamaConfig, MistralConfig, Olmo2Config, Phi3Config, Qwen3Config

import vtprune
from vtprune.errors import UnsupportedStageError

from . import models
from .reference import assert_recomputed, generate

SMALL = dict(models.TEXT, num_hidden_layers=6, num_key_value_heads=2)

TOWERS = {
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "mistral": MistralConfig(**SMALL),
    "gemma": GemmaConfig(**SMALL, head_dim=16),
    "scaled-rope": LlamaConfig(**SMALL, rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)),
    "phi3": Phi3Config(**SMALL),
    "olmo2": Olmo2Config(**SMALL),
}
NO_ROWS = {"phi3": ("fastv", "transprune"), "olmo2": ("transprune",)}
"""Fused projections; no norm before attention, so that it cannot be computed before its layer runs."""


@pytest.fixture(scope="module")
def tower(request):
    return models.with_text_tower(TOWERS[request.param])


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("method", ["divprune", "fastv", "transprune"])
@pytest.mark.parametrize("tower", TOWERS, indirect=True, ids=TOWERS.keys())
def test_generation_equals_recompute(request, tower, method, positions):
    batch = models.batch_of_three(tower)
    if method in NO_ROWS.get(request.node.callspec.params["tower"], ()):
        with pytest.raises(UnsupportedStageError, match="methods before the LLM work"):
            vtprune.prune(tower, method, keep_ratio=0.4, positions=positions)
        return
    with vtprune.prune(tower, method, keep_ratio=0.4, positions=positions) as session:
        output = generate(tower, batch.inputs())
    assert_recomputed(tower, batch, session.report, output, positions)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("method", ["divprune", "fastv", "transprune"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_sliding_window_counts_the_tokens_that_are_there(attention, method, positions):
    """Prompts and what is left of them are longer than the window, and the cache forgets what left it."""
    model = models.with_text_tower(MistralConfig(**SMALL, sliding_window=12), attention)
    batch = models.batch_of_three(model)
    with vtprune.prune(model, method, keep_ratio=0.6, positions=positions) as session:
        output = generate(model, batch.inputs())
    assert max(session.report.counts[:, -1] + torch.tensor(session.report.text_tokens)) > 12
    assert_recomputed(model, batch, session.report, output, positions)
