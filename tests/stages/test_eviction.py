# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

import vtprune
from vtprune.errors import ConfigError, UnsupportedStageError
from vtprune.methods.mustdrop import AliveInLastLayer
from vtprune.signals import CacheSignal
from vtprune.stages.cutting import cut_sequence
from vtprune.stages.eviction import EvictionStage
from vtprune.stages.slots import CacheContents
from vtprune.tokens import Selection

from .hand_made import DEPTH, SHAPE, Scripted, call_of, empty_cache, encoding, row_of, with_newlines


@dataclass(frozen=True, kw_only=True)
class Evicting(Scripted, vtprune.AfterPrefill):
    name: ClassVar[str] = "evicting"

    where: tuple[int, ...] = (1, 2, 3)

    def layers(self, shape):
        return self.where


@dataclass(frozen=True)
class AliveIn(CacheSignal):
    layer: int

    def read_cache(self, view):
        return view.alive(self.layer)


def prefilled(*prompts, keeps, media, cache=None, past=0):
    """A call that was cut on the input of layer 2, and whose cache is filled.

    keeps: for each image the places of the tokens that pass the cut. The keys of a column are its number, in the
    sequence, plus 100 in the second sample.
    """
    cache = empty_cache() if cache is None else cache
    call = call_of(*prompts, encodings=[encoding(*media)], cache=cache, past=past)
    groups = call.crop_groups()
    keep = torch.zeros_like(groups.valid)
    for group, places in enumerate(keeps):
        keep[group, list(places)] = True
    hidden = (torch.arange(call.length) + past + 100 * torch.arange(call.batch)[:, None])[..., None].float()
    after, _ = cut_sequence(call, hidden, groups, Selection(keep), 2, compact=False)
    for layer in range(DEPTH):
        states = (hidden if layer < 2 else after)[:, None].expand(-1, 2, -1, 4)
        cache.update(states, states, layer)
    return call


def two_samples(**fields):
    """Images in the columns 1 to 3 and, in the second sample, 2 and 3, of which column 2 goes in layer 2."""
    return prefilled("tiiitt", ".tiitt", keeps=[range(3), [1]], media=[row_of(3), row_of(2)], **fields)


def evict(call, method, shape=SHAPE) -> CacheContents:
    contents = CacheContents()
    EvictionStage([method], shape, lambda method, tokens: method.choose(tokens)).after_prefill(call, contents)
    return contents


def cached(call, layer) -> list[list[int]]:
    """The real columns in a cache layer, by their keys."""
    inner, real = call.cache.layers[layer].inner, call.cache.layers[layer].layout.real
    keys = inner.keys[:, 0, :, 0].long()
    assert torch.equal(inner.keys, inner.values)
    real = torch.ones_like(keys, dtype=torch.bool) if real is None else real
    return [row[seen].tolist() for row, seen in zip(keys, real, strict=True)]


def test_a_method_is_shown_the_cached_keys_of_each_layers_visual_tokens():
    method = Evicting(keeps=((range(3), [0, 1]), (range(3), [0])), where=(1, 3))
    evict(two_samples(), method)
    before, behind = method.seen
    assert before.layer == 1 and before.features.shape == (2, 3, 8)
    assert before.features[..., 0].tolist() == [[1, 2, 3], [102, 103, 0]]
    assert behind.layer == 3 and behind.features[..., 5].tolist() == [[1, 2, 3], [103, 0, 0]]
    assert behind.valid.tolist() == [[True] * 3, [True, False, False]]
    assert before.budget.tolist() == [-1, -1] and before.runs is None


def test_what_is_not_kept_leaves_keys_and_values_and_lengths_stay():
    call = two_samples()
    evict(call, Evicting(keeps=(([0], [1]), ([2], [0]), ([0], [0]))))
    assert cached(call, 0) == [[0, 1, 2, 3, 4, 5], [101, 102, 103, 104, 105]]
    assert cached(call, 1) == [[0, 1, 4, 5], [101, 103, 104, 105]]
    assert cached(call, 2) == [[0, 3, 4, 5], [101, 103, 104, 105]]
    assert cached(call, 3) == [[0, 1, 4, 5], [101, 103, 104, 105]]
    assert [call.cache.get_seq_length(layer) for layer in range(DEPTH)] == [6] * DEPTH
    assert [layer.physical for layer in call.cache.layers] == [6, 4, 4, 4]
    assert call.cache.layers[1].layout.real is None, "all that is left is real"


def test_a_sample_that_keeps_more_leaves_padding_in_the_others():
    call = two_samples()
    evict(call, Evicting(keeps=(([0, 1, 2], []),), where=(1,)))
    layer = call.cache.layers[1]
    assert layer.layout.real.tolist() == [[True] * 6, [False] * 3 + [True] * 3]
    assert cached(call, 1) == [[0, 1, 2, 3, 4, 5], [101, 104, 105]]


def test_contents_are_noted_for_every_layer():
    call = two_samples()
    contents = evict(call, Evicting(keeps=(([0], [1]), ([2], [0])), where=(1, 2)))
    in_cache, _ = contents.of([torch.tensor([1, 2, 3]), torch.tensor([2, 3])])
    assert [[columns.tolist() for columns in layer] for layer in in_cache] == [
        [[1, 2, 3], [2, 3]],
        [[1], [3]],
        [[3], [3]],
        [[1, 2, 3], [3]],
    ]


def test_a_method_that_keeps_everything_changes_nothing():
    call = two_samples()
    layouts = [layer.layout for layer in call.cache.layers]
    contents = evict(call, Evicting(keeps=((range(3), [0, 1]), (range(3), [0]))))
    assert [layer.layout for layer in call.cache.layers] == layouts and contents.columns is None


def test_layers_that_hold_the_same_share_a_layout():
    call = two_samples()
    evict(call, Evicting(keeps=(([0], [0]),), where=(2, 3)))
    assert call.cache.layers[2].layout is call.cache.layers[3].layout
    other = two_samples()
    evict(other, Evicting(keeps=(([0], [0]), ([1], [0])), where=(2, 3)))
    assert other.cache.layers[2].layout is not other.cache.layers[3].layout


def test_a_turn_leaves_what_earlier_turns_left_and_counts_it():
    """In the first turn two layers were left with different numbers of columns."""
    first = prefilled("tiiit", keeps=[range(2)], media=[row_of(3)])
    evict(first, Evicting(keeps=(([],), ([0, 1],)), where=(2, 3)))
    assert cached(first, 2) == [[0, 4]] and cached(first, 3) == [[0, 1, 2, 4]]
    second = prefilled("tiiit", keeps=[range(2)], media=[row_of(3)], cache=first.cache, past=5)
    method = Evicting(keeps=(([1],),), where=(2, 3))
    contents = evict(second, method)
    assert [tokens.features[..., 0].tolist() for tokens in method.seen] == [[[6, 7]]] * 2
    assert cached(second, 1) == [list(range(10))]
    assert cached(second, 2) == [[0, 4, 5, 7, 9]] and cached(second, 3) == [[0, 1, 2, 4, 5, 7, 9]]
    assert [second.cache.get_seq_length(layer) for layer in range(DEPTH)] == [10] * DEPTH
    whole, *cut = (columns.tolist() for columns in contents.columns[1:])
    assert whole == [[-1, 6, 7, 8, -1]] and cut == [[[-1, -1, 7, -1]]] * 2


def test_separators_go_with_their_lines():
    """Columns 3 and 6 end rows of two tokens each; the token in column 1 is cut on the input of layer 2."""
    call = prefilled("tiiiiiit", keeps=[[1, 2, 3]], media=[with_newlines(2, 2)])
    contents = evict(call, Evicting(keeps=(([2, 3],), ([1, 2],), ([],))))
    assert cached(call, 1) == cached(call, 2) == [[0, 4, 5, 6, 7]] and cached(call, 3) == [[0, 7]]
    assert contents.columns[2].tolist() == [[-1, -1, -1, 4, 5, 6, -1]]


def test_a_signal_tells_what_other_layers_computed():
    call = two_samples()
    signals = (AliveIn(0), AliveIn(3), AliveInLastLayer())
    method = Evicting(keeps=((range(3), [0, 1]),), where=(1,), requests=signals)
    evict(call, method)
    (read,) = method.read
    assert read[AliveIn(0)].tolist() == [[True] * 3, [True, True, False]]
    assert read[AliveIn(3)].tolist() == read[AliveInLastLayer()].tolist() == [[True] * 3, [False, True, False]]


def test_layers_with_a_sliding_window_are_left_alone():
    kinds = ["full_attention", "sliding_attention"] * 2
    config = LlamaConfig(
        num_hidden_layers=DEPTH, hidden_size=8, num_attention_heads=2, layer_types=kinds, sliding_window=32
    )
    call = two_samples(cache=DynamicCache(config=config))
    method = Evicting(keeps=(([], []),))
    evict(call, method)
    assert [tokens.layer for tokens in method.seen] == [2]
    assert [layer.physical for layer in call.cache.layers] == [6, 6, 3, 6]


def test_calls_that_dropped_nothing_and_calls_without_a_cache_are_left_alone():
    method = Evicting(keeps=(([],),))
    whole = call_of("tiit", encodings=[encoding(row_of(2))], cache=empty_cache())
    assert evict(whole, method).columns is None and not method.seen
    cacheless = call_of("tiit", encodings=[encoding(row_of(2))])
    cut_sequence(
        cacheless, torch.zeros(1, 4, 1), cacheless.crop_groups(), Selection(torch.zeros(1, 2).bool()), 2, compact=False
    )
    assert evict(cacheless, method).columns is None and not method.seen


def test_prompts_that_are_sent_again_are_refused():
    EvictionStage([], SHAPE, None).check(True)
    stage = EvictionStage([Evicting()], SHAPE, None)
    stage.check(False)
    with pytest.raises(UnsupportedStageError, match="use_cache=True"):
        stage.check(True)


def test_a_cache_is_emptied_by_one_method():
    with pytest.raises(ConfigError, match="evicting and evicting"):
        EvictionStage([Evicting(), Evicting()], SHAPE, None)
