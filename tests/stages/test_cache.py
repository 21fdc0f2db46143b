# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.cache_utils import StaticLayer

from vtprune.errors import UnsupportedStageError, VTPruneError
from vtprune.stages.cache import CacheLayout, Owner, check_cache, pruned_layers, wrap_cache

CONFIG = LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2)


def states(n, batch=2):
    return torch.randn(batch, 2, n, 4), torch.randn(batch, 2, n, 4)


def pruned(owner=None, real=None, shift=None) -> DynamicCache:
    cache = DynamicCache(config=CONFIG)
    wrap_cache(cache, owner or Owner(), 2)
    cache.layers[0].layout = CacheLayout(dropped=3, real=real, shift=shift)
    for layer in range(2):
        cache.update(*states(5), layer)
    return cache


def test_lengths_are_logical_and_masks_physical():
    cache = pruned()
    assert cache.get_seq_length(0) == 8 and cache.get_seq_length(1) == 5
    assert cache.get_mask_sizes(2, 0) == (7, 3) and cache.layers[0].physical == 5
    assert cache.layers[0].keys.shape[2] == 5 and len(pruned_layers(cache)) == 2


def test_layers_created_lazily_are_wrapped_too():
    cache = DynamicCache()
    wrap_cache(cache, Owner(), 2)
    assert len(pruned_layers(cache)) == 2


def test_layouts_follow_beams_and_crops():
    real = torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
    cache = pruned(real=real, shift=torch.tensor([[1], [2]]))
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.layers[0].layout.real.tolist() == [real[1].tolist()] * 2
    assert cache.layers[0].layout.shift.tolist() == [[2], [2]]
    cache.crop(-2)
    assert cache.layers[0].layout.real.shape == (2, 3) and cache.get_seq_length(0) == 6
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].layout.real.shape == (4, 3)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.layers[0].layout.real.shape == (1, 3)


def test_layouts_extend():
    layout = CacheLayout(dropped=1).extend(2, torch.tensor([[True, False]]), 4, torch.tensor([[3]]), past=3)
    assert layout.dropped == 5 and layout.real.tolist() == [[True, True, True, True, False]]
    assert layout.mask().shape == (1, 10)
    longer = layout.extend(1, None, 0, torch.tensor([[2]]), past=5)
    assert longer.real.shape == (1, 6) and longer.shift.tolist() == [[5]]


def test_a_cache_outlives_its_session_only_to_refuse():
    owner = Owner()
    cache = pruned(owner)
    owner.active = False
    before = cache.layers[0].keys.clone()
    with pytest.raises(VTPruneError, match="has been removed"):
        cache.update(*states(1), 0)
    assert torch.equal(cache.layers[0].keys, before)


def test_foreign_and_unknown_caches_are_refused():
    with pytest.raises(VTPruneError, match="another vtprune session"):
        check_cache(pruned(), Owner())
    static = DynamicCache(config=CONFIG)
    static.layers[1] = StaticLayer(max_cache_len=8)
    with pytest.raises(UnsupportedStageError, match="StaticLayer"):
        check_cache(static, Owner())
    check_cache(StaticCache(config=CONFIG, max_cache_len=8), Owner())
