# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from vtprune.stages.cutting import cut_sequence
from vtprune.tokens import Selection

from .hand_made import DEPTH, call_of, empty_cache, encoding, fill, numbered, row_of, with_newlines

PROMPTS = ("..tiit", "titiii")


def call(**fields):
    """Images in columns 3 and 4 of the first sample; 1, and 3 to 5 of the second."""
    return call_of(*PROMPTS, encodings=[encoding(row_of(2), row_of(1), row_of(3))], **fields)


def cut(prompts, *places, layer=2, compact=False, sources=None):
    """Keep of each sample's visual tokens those at some places."""
    groups = prompts.sample_groups()
    keep = torch.zeros_like(groups.valid)
    for group, kept in enumerate(places):
        keep[group, list(kept)] = True
    hidden = numbered(prompts.batch, prompts.sequence.columns.shape[1])
    return cut_sequence(prompts, hidden, groups, Selection(keep, sources=sources), layer, compact=compact)[0]


def test_groups_are_crops_images_or_samples():
    prompts = call()
    assert prompts.crop_groups().columns.tolist() == [[3, 4, 0], [1, 0, 0], [3, 4, 5]]
    assert prompts.image_groups().images.tolist() == [0, 1, 2] and prompts.image_groups().rows.tolist() == [0, 1, 1]
    samples = prompts.sample_groups()
    assert samples.columns.tolist() == [[3, 4, 0, 0], [1, 3, 4, 5]] and samples.images.tolist() == [-1, -1]


def test_separators_are_in_no_group():
    prompts = call_of("tiiiiiit", encodings=[encoding(with_newlines(2, 2))])
    for groups in (prompts.crop_groups(), prompts.image_groups(), prompts.sample_groups()):
        assert groups.columns.tolist() == [[1, 2, 4, 5]]


def test_after_a_cut_groups_are_of_what_is_left():
    prompts = call()
    cut(prompts, [1], [0, 3])
    assert prompts.sequence.real.tolist() == [[False, True, True, True], [True] * 4]
    assert prompts.sample_groups().columns.tolist() == [[2, 0], [1, 3]]
    assert prompts.sample_groups(prompts.whole).columns.shape == (2, 4)
    assert prompts.sample_groups().gather(prompts.encoded_tokens()).tolist() == [[1, 0], [2, 5]]


def test_runs_are_parted_by_text_alone():
    prompts = call()
    assert prompts.runs()[1].tolist() == [-1, 0, 0, 1, 1, 1]
    cut(prompts, [0], [1, 3])
    assert prompts.sequence.columns[1].tolist() == [0, 2, 3, 5] and prompts.runs()[1].tolist() == [-1, -1, 0, 0]


def test_layers_belong_to_the_cut_before_them():
    prompts = call()
    cut(prompts, [0], [0], layer=1)
    cut(prompts, [], [0], layer=3)
    numbers = {id(layout): number for number, layout in enumerate(prompts.sequence_layouts)}
    assert [numbers[id(prompts.sequence_at(layer))] for layer in range(DEPTH)] == [0, 1, 1, 2]
    assert prompts.key(1) == prompts.key(2) != prompts.key(3) != prompts.key(0)


def test_keys_of_prompts_are_of_their_text_alone():
    one, other = (call_of(prompt, encodings=[encoding(row_of(2))]) for prompt in ("tiit", ".tiit"))
    other.ids[0, [1, 4]] = torch.tensor([10, 13])
    assert one.prompt_key(0) == other.prompt_key(0) != call().prompt_key(0)
    answered = call_of("tiit", encodings=[encoding(row_of(2))], prompt=torch.tensor([[True, True, True, False]]))
    assert answered.prompt_key(0) != one.prompt_key(0)
    assert call_of("tiit", encodings=[encoding(row_of(2))], ids=None).prompt_key(0) == 0


def test_positions_are_shifted_by_what_earlier_turns_lost():
    """The first turn lost two tokens of three, whose positions were given to others."""
    cache = empty_cache()
    first = call_of("tiiit", encodings=[encoding(row_of(3))], cache=cache)
    cut(first, [0], layer=0, compact=True)
    fill(cache, torch.zeros(1, 3, 8))
    assert cache.layers[0].layout.shift.tolist() == [[2]] and cache.get_seq_length() == 5
    images, positions = [encoding(row_of(1))], torch.tensor([[5, 6]])
    second = call_of("ti", encodings=images, past=5, positions=positions, cache=cache)
    assert second.wrapped and second.positions_at(0).tolist() == [[3, 4]]
    assert second.places_at(0, torch.zeros(1, 2, 8)).ids.tolist() == [[3, 4]]


def test_tokens_to_come_count_on_from_the_last_column_of_the_call():
    """With padding on the right, that is not the last token's."""
    cache = empty_cache()
    images, positions = encoding(row_of(2), row_of(2)), torch.arange(6)[None]
    prompts = call_of("tiit..", "tiittt", encodings=[images], cache=cache, positions=positions)
    cut(prompts, [0], [0], layer=0)
    assert cache.layers[0].layout.shift.tolist() == [[2], [0]]


def test_positions_of_all_columns_keep_those_that_were_compacted():
    prompts = call_of("tiiit", encodings=[encoding(row_of(3))])
    cut(prompts, [1], layer=1, compact=True)
    assert prompts.sequence.positions.tolist() == [[0, 1, 2]]
    assert prompts.positions_of_columns(prompts.sequence).tolist() == [[0, 1, 1, 3, 2]]


def test_blocks_are_those_of_the_call_and_of_what_is_left():
    blocks = torch.tensor([[7, 7, -1, 0, 0, 0, -1]])
    prompts = call_of("tiiitt", encodings=[encoding(row_of(3))], blocks=blocks, past=2)
    assert prompts.blocks.tolist() == [[-1, 0, 0, 0, -1, -1]], "the cache's are left out, missing ones are none"
    cut(prompts, [0, 2])
    assert prompts.blocks_at(0).tolist() == [[-1, 0, 0, 0, -1, -1]]
    assert prompts.blocks_at(2).tolist() == [[-1, 0, 0, -1, -1]]
    assert call().blocks_at(0) is None


def test_deepstack_features_are_cut_and_merged_like_their_tokens():
    features = {1: torch.tensor([[1.0], [2], [3]]), 3: torch.tensor([[10.0], [20], [60]])}
    prompts = call_of("tiiit", encodings=[encoding(row_of(3))], deepstack=features)
    assert prompts.add_deepstack(1, numbered(1, 5)).flatten().tolist() == [1, 3, 5, 7, 5]
    cut(prompts, [1], sources=torch.tensor([[1, 1, -1]]))
    assert prompts.deepstack_at(3, prompts.sequence).flatten().tolist() == [0, 15, 0]
    assert prompts.add_deepstack(3, numbered(1, 3)).flatten().tolist() == [1, 17, 3]
    for layer in (0, 2, 4):
        assert prompts.add_deepstack(layer, numbered(1, 3)).flatten().tolist() == [1, 2, 3]


def test_what_is_added_on_the_first_layers_input_is_what_was_cut_and_merged_before():
    prompts = call_of("tiiit", encodings=[encoding(row_of(3))])
    assert prompts.take_deepstack({1: numbered(1, 3)[0]}, numbered(1, 5)).flatten().tolist() == [1, 2, 3, 4, 5]
    assert prompts.add_deepstack(0, numbered(1, 5)).flatten().tolist() == [1, 2, 3, 4, 5]
    cut(prompts, [1])
    assert prompts.take_deepstack({0: numbered(1, 3)[0]}, numbered(1, 3)).flatten().tolist() == [1, 0, 3]
    assert prompts.add_deepstack(0, torch.tensor([[[10.0], [0], [30]]])).flatten().tolist() == [10, 2, 30]


def test_outputs_are_restored_by_the_layout_of_their_layer():
    prompts = call_of("tiiit", encodings=[encoding(row_of(3))])
    cut(prompts, [1], layer=2)
    last = torch.tensor([[[1.0], [3], [5]]])
    states = (numbered(1, 5), numbered(1, 5), numbered(1, 5), last, None)
    output = prompts.restore(BaseModelOutputWithPast(last_hidden_state=last, hidden_states=states))
    assert output.last_hidden_state.flatten().tolist() == [1, 1, 3, 3, 5]
    # state 2 is what layer 1 gives, state 3 is what layer 2 gives
    assert [None if s is None else s.flatten().tolist() for s in output.hidden_states] == [
        *[[1, 2, 3, 4, 5]] * 3,
        [1, 1, 3, 3, 5],
        None,
    ]
    restored, other = prompts.restore((last, "cache"))
    assert restored.flatten().tolist() == [1, 1, 3, 3, 5] and other == "cache"


def test_caches_are_told_of_padding_only_where_there_is_some():
    for prompts, padded in ((["tiit"], False), ([".tiit", "tiitt"], True)):
        cache = empty_cache()
        found = call_of(*prompts, encodings=[encoding(*[row_of(2)] * len(prompts))], cache=cache)
        found.update_cache_layouts(0)
        assert (cache.layers[0].layout.real is not None) == padded
        assert (found.padding_mask(0) is not None) == padded


def test_text_is_the_prompts_without_what_stands_around_images():
    prompts = call_of("t<ii<tt", encodings=[encoding(row_of(2))], prompt=torch.tensor([[True] * 6 + [False]]))
    assert prompts.text.nonzero()[:, 1].tolist() == [0, 5]


def test_layers_without_keys_have_what_all_others_have():
    cache = empty_cache()
    prompts = call(cache=cache)
    prompts.update_cache_layouts(0)
    wrapped = cache.layers[1]
    cache.layers[0] = SimpleNamespace(state="of a convolution")
    assert prompts.cached(0) is wrapped and prompts.cached(2) is cache.layers[2]
