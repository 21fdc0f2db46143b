# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune.stages.cutting import cut_sequence, idle_separators
from vtprune.tokens import Selection

from .hand_made import call_of, empty_cache, encoding, numbered, row_of, with_newlines

SAMPLES = ("..tiiitt", "tiitittt")


def call():
    """Columns 3, 4, 5 of the first sample are an image; 1 and 2 of the second are one, and 4."""
    return call_of(*SAMPLES, encodings=[encoding(row_of(3), row_of(2), row_of(1))])


def kept(groups, *places) -> torch.Tensor:
    keep = torch.zeros_like(groups.valid)
    for group, chosen in enumerate(places):
        keep[group, list(chosen)] = True
    return keep


def cut(call, *places, layer=0, **options):
    groups = call.crop_groups()
    hidden = numbered(call.batch, call.sequence.columns.shape[1])
    options = {"compact": False} | options
    return cut_sequence(call, hidden, groups, Selection(kept(groups, *places)), layer, **options)


def test_states_and_columns_of_what_stays_are_returned():
    prompts = call()
    hidden, index = cut(prompts, [1], [0], [])
    assert index[1].tolist() == [0, 1, 3, 5, 6, 7]
    # the first sample has one real column less, so that one of padding is left
    assert hidden[..., 0].tolist() == [[0, 0, 3, 5, 7, 8], [9, 10, 12, 14, 15, 16]]
    assert prompts.sequence.real.tolist() == [[False, False, True, True, True, True], [True] * 6]
    assert prompts.sequence.merged_into.tolist() == [[-1, -1, 2, -1, 4, -1, 6, 7], [0, 1, -1, 3, -1, 5, 6, 7]]


def test_a_selection_that_keeps_everything_changes_nothing():
    prompts = call()
    assert cut(prompts, [0, 1, 2], [0, 1], [0]) is None
    assert not prompts.pruned and prompts.starts == [0]


def test_cuts_on_one_layer_are_one_layout_and_later_ones_follow():
    prompts = call()
    cut(prompts, [1, 2], [0, 1], [0], layer=2)
    assert prompts.starts == [0, 2] and prompts.sequence_at(1) is prompts.whole
    cut(prompts, [1], [0], [0], layer=2)
    assert prompts.starts == [0, 2] and prompts.sequence_at(2) is prompts.sequence
    cut(prompts, [], [0], [0], layer=3)
    assert prompts.starts == [0, 2, 3] and len(prompts.sequence_layouts) == 3
    assert prompts.sequence_at(2).visual.sum(1).tolist() == [1, 2]
    assert prompts.sequence_at(3).visual.sum(1).tolist() == [0, 2]


def test_merged_features_replace_those_of_kept_tokens_alone():
    prompts = call()
    groups, hidden = prompts.crop_groups(), numbered(2, 8)
    features = torch.tensor([[-1.0, -2, -3], [-4, -5, -6], [-7, -8, -9]])[..., None]
    sources = torch.tensor([[1, 1, -1], [0, 1, -1], [0, -1, -1]])
    selection = Selection(kept(groups, [1], [0, 1], [0]), features, sources)
    after, _ = cut_sequence(prompts, hidden, groups, selection, 0, compact=False)
    assert after[0, -4:, 0].tolist() == [3, -2, 7, 8]
    assert after[1, :, 0].tolist() == [9, -4, -5, 12, -7, 14, 15, 16]
    assert prompts.sequence.merged_into[0, 3:6].tolist() == [4, 4, -1]
    assert hidden[0, 4, 0] == 5, "the states that came in were changed"


def test_masking_hides_without_shortening_and_clears_padding_alone():
    prompts = call()
    hidden, index = cut(prompts, [1], [0, 1], [0], masking=True)
    assert index.tolist() == [list(range(8))] * 2
    assert hidden[0, :, 0].tolist() == [0, 0, 3, 4, 5, 6, 7, 8]
    assert prompts.sequence.masked.nonzero().tolist() == [[0, 3], [0, 5]]
    assert prompts.sequence.merged_into[0, 3:6].tolist() == [-1, 4, -1]


def test_masked_tokens_keep_their_states_where_others_are_merged():
    prompts = call()
    groups = prompts.crop_groups()
    features = torch.full((3, 3, 1), -1.0)
    selection = Selection(kept(groups, [1], [0, 1], [0]), features, torch.tensor([[1, 1, 1], [0, 1, -1], [0, -1, -1]]))
    hidden, _ = cut_sequence(prompts, numbered(2, 8), groups, selection, 0, compact=False, masking=True)
    assert hidden[0, :, 0].tolist() == [0, 0, 3, 4, -1, 6, 7, 8]


def test_what_is_not_finite_does_not_outlive_its_column():
    prompts = call()
    hidden = numbered(2, 8)
    hidden[0, 5] = torch.nan  # its column is padding after the cut
    groups = prompts.crop_groups()
    after, _ = cut_sequence(prompts, hidden, groups, Selection(kept(groups, [1], [0], [])), 0, compact=False)
    assert after.isfinite().all()


def test_compact_positions_are_renumbered():
    prompts = call()
    cut(prompts, [1], [0], [], compact=True)
    assert prompts.sequence.positions.tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    other = call()
    cut(other, [1], [0], [], compact=False)
    assert other.sequence.positions[1].tolist() == [0, 1, 3, 5, 6, 7]


def test_a_separator_goes_with_the_last_token_of_its_line():
    """Two rows of two tokens, and a separator behind each: columns 3 and 6."""
    prompts = call_of("tiiiiiit", encodings=[encoding(with_newlines(2, 2))])
    keep = torch.tensor([[1, 0, 0, 1, 1, 0, 1, 1]]).bool()
    assert idle_separators(prompts, keep).nonzero().tolist() == [[0, 3]]
    keep[0, 4] = False
    assert idle_separators(prompts, keep).nonzero().tolist() == [[0, 3], [0, 6]]
    cut(prompts, [2, 3])
    assert prompts.sequence.columns.tolist() == [[0, 4, 5, 6, 7]]
    assert prompts.sequence.merged_into.tolist() == [[0, -1, -1, -1, 4, 5, 6, 7]]


def test_separators_can_be_kept():
    prompts = call_of("tiiiiiit", encodings=[encoding(with_newlines(2, 2))])
    cut(prompts, [2, 3], keep_separators=True)
    assert prompts.sequence.columns.tolist() == [[0, 3, 4, 5, 6, 7]]


def test_without_separators_none_is_idle():
    prompts = call()
    assert not idle_separators(prompts, torch.zeros_like(prompts.real)).any()


def test_the_cache_is_told_from_the_cut_on():
    cache = empty_cache()
    prompts = call_of(*SAMPLES, encodings=[encoding(row_of(3), row_of(2), row_of(1))], cache=cache)
    prompts.memo["mask"] = "of all columns"
    cut(prompts, [1], [0], [], layer=2)
    assert [layer.layout.dropped for layer in cache.layers] == [0, 0, 2, 2]
    assert cache.layers[1].layout.real.shape == (2, 8)
    assert cache.layers[2].layout.real.tolist() == [[False, False, True, True, True, True], [True] * 6]
    assert not prompts.memo
    cut(prompts, [], [0], [], layer=3)
    assert [layer.layout.dropped for layer in cache.layers] == [0, 0, 2, 2]
    assert cache.layers[3].layout.real.tolist() == [[False] * 3 + [True] * 3, [True] * 6]
