# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import vtprune
from vtprune.testing import families
from vtprune.testing.media import IMAGE

from .checks import generate

NAME = "qwen4_exp"
pytestmark = pytest.mark.skipif(not families.is_available(NAME), reason="not in this release of transformers")


@torch.no_grad()
def test_the_index_of_the_tiny_model_leaves_columns_out():
    """Otherwise the other tests would say nothing about blocks of columns."""
    model = families.build(NAME)
    inputs = families.batch(NAME, model).singles[0]
    chosen = model(**inputs).logits[0, -1]
    for layer in model.get_decoder().layers:
        if hasattr(layer, "self_attn"):
            layer.self_attn.indexer.token_budget = layer.self_attn.indexer.block_topk = 60
    assert (model(**inputs).logits[0, -1] - chosen).abs().max() > 1e-2


@torch.no_grad()
def test_runs_of_ids_are_those_of_the_tokens_that_are_left():
    """Without any visual token, runs go on from the text before an image to that behind it."""
    model = families.build(NAME)
    inputs = families.batch(NAME, model).singles[0]
    ids = inputs["input_ids"]
    seen = []
    ple = model.get_decoder().layers[0].ple.ple_embedding
    ple.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with vtprune.prune(model, "uniform", keep_tokens=0):
        model(**inputs)
    with vtprune.prune(model, "uniform", keep_tokens=3):
        model(**inputs)
    assert torch.equal(seen[0], ids[ids != IMAGE][None])
    kept = seen[1][0]
    assert (kept == IMAGE).sum() == 3 and torch.equal(kept[kept != IMAGE][None], seen[0])


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_positions_of_the_index_are_as_many_as_its_keys(beams):
    model = families.shared(NAME)
    batch = families.batch(NAME, model)
    with vtprune.prune(model, "divprune", keep_ratio=0.4, positions="compact"):
        plain = generate(model, batch)
        output = model.generate(
            **batch.inputs, max_new_tokens=4, num_beams=beams, return_dict_in_generate=True, use_cache=True
        )
    cache = output.past_key_values if "past_key_values" in output else output.cache
    for layer in (layer for layer in cache.layers if hasattr(layer, "indexer_keys")):
        stored = layer.keys.shape[2]
        assert layer.indexer_keys.shape[1] == stored < batch.inputs["input_ids"].shape[1]
        if layer.indexer_position_ids is not None:
            assert layer.indexer_position_ids.shape[-1] == stored
    assert plain.sequences.shape[1] == batch.inputs["input_ids"].shape[1] + 5
