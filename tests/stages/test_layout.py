# SPDX-License-Identifier: Apache-2.0
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtprune.stages.layout import (
    Groups,
    SequenceLayout,
    compact_columns,
    counted_from,
    last_axis,
    spread_columns,
    take_columns,
)
from vtprune.tokens import Selection

BOOLS = st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3)


@given(BOOLS)
def test_compaction_keeps_order_and_aligns_right(rows):
    keep = torch.tensor(rows)
    index, real = compact_columns(keep)
    for row in range(len(rows)):
        assert index[row][real[row]].tolist() == keep[row].nonzero()[:, 0].tolist()
        assert real[row].tolist() == sorted(real[row].tolist())  # padding on the left


IMAGES = torch.tensor([[-1, -1, -1, 0, 0, 0, -1, -1], [1, 1, -1, -1, 2, -1, -1, -1]])


def sequence() -> SequenceLayout:
    """Two samples of 8 columns: left padding and one image of 3; two images of 2 and 1."""
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8]).bool()
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7]])
    return SequenceLayout.whole(real, IMAGES >= 0, positions)


def groups() -> Groups:
    return Groups.of_labels(IMAGES, torch.tensor([0, 1, 1]), torch.arange(3))


def test_groups_gather_and_scatter():
    found = groups()
    assert found.columns.tolist() == [[3, 4, 5], [0, 1, 0], [4, 0, 0]]
    assert found.valid.tolist() == [[True] * 3, [True, True, False], [True, False, False]]
    x = torch.arange(16).view(2, 8)
    assert found.gather(x).tolist() == [[3, 4, 5], [8, 9, 0], [12, 0, 0]]
    back = found.scatter(torch.full((3, 3), 99), x)
    assert back.tolist() == [[0, 1, 2, 99, 99, 99, 6, 7], [99, 99, 10, 11, 99, 13, 14, 15]]


def cut(before: SequenceLayout, keep_rows, sources=None, compact=True) -> tuple[SequenceLayout, torch.Tensor]:
    found = groups()
    selection = Selection(torch.tensor(keep_rows).bool() & found.valid, sources=sources)
    keep = found.scatter(selection.keep, before.real)
    merged_into = before.merged_after(found, selection, keep)
    return before.cut(keep, merged_into, compact=compact)


def test_a_cut_drops_tokens_and_padding():
    after, index = cut(sequence(), [[0, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert after.columns.tolist()[0][-4:] == [2, 4, 6, 7] and after.real[0].sum() == 4
    assert after.columns.tolist()[1] == [0, 2, 3, 5, 6, 7]
    assert index.shape == (2, 6) and after.dropped == 2
    assert after.merged_into[0].tolist() == [-1, -1, 2, -1, 4, -1, 6, 7]
    assert after.visual[0][after.real[0]].tolist() == [False, True, False, False]


def test_compact_positions_are_ranks():
    after, _ = cut(sequence(), [[0, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert after.positions[1].tolist() == [0, 1, 2, 3, 4, 5] and after.end.tolist() == [[3], [5]]
    assert after.positions[0][after.real[0]].tolist() == [0, 1, 2, 3]
    kept, _ = cut(sequence(), [[0, 1, 0], [1, 0, 0], [0, 0, 0]], compact=False)
    assert kept.positions[1].tolist() == [0, 2, 3, 5, 6, 7] and kept.end.tolist() == [[5], [7]]


def test_compact_positions_on_the_axes_of_m_rope():
    """Text has one position on all axes; compacted visual tokens, too, stand at their rank on each of them."""
    before = sequence()
    axes = torch.stack([before.positions, before.positions // 2, before.positions - before.positions // 3])
    before = SequenceLayout.whole(before.real, before.visual, axes)
    keep = before.real & (torch.arange(8) != 3)
    after, index = before.cut(keep, before.merged_into, compact=True)
    assert after.positions.shape == (3, 2, 7)
    assert (after.positions[:, 1] == torch.arange(7)).all()
    kept, _ = before.cut(keep, before.merged_into, compact=False)
    assert torch.equal(kept.positions[:, 1], axes[:, 1][:, index[1]])


def test_merged_tokens_go_where_their_representative_goes():
    sources = torch.tensor([[1, 1, 1], [0, 0, -1], [0, -1, -1]])
    after, _ = cut(sequence(), [[0, 1, 0], [1, 0, 0], [1, 0, 0]], sources)
    assert after.merged_into[0].tolist()[3:6] == [4, 4, 4]
    assert after.merged_into[1].tolist() == [0, 0, 2, 3, 4, 5, 6, 7]


def test_restored_columns_carry_the_last_survivor_before_them():
    after, index = cut(sequence(), [[0, 1, 0], [1, 0, 0], [0, 0, 0]])
    hidden = take_columns(torch.arange(1.0, 17).view(2, 8, 1), index)
    restored = after.restore(hidden, 8)[..., 0]
    assert restored[0].tolist() == [0, 0, 3, 3, 5, 5, 7, 8]
    assert restored[1].tolist() == [9, 9, 11, 12, 12, 14, 15, 16]


def test_no_column_kept_leaves_one_of_padding():
    index, real = compact_columns(torch.zeros(2, 3, dtype=torch.bool))
    assert index.shape == (2, 1) and real.tolist() == [[False], [False]]


def test_columns_are_taken_from_flags_and_from_states():
    index = torch.tensor([[2, 0]])
    assert take_columns(torch.tensor([[7, 8, 9]]), index).tolist() == [[9, 7]]
    assert take_columns(torch.tensor([[[1, 2], [3, 4], [5, 6]]]), index).tolist() == [[[5, 6], [1, 2]]]


def test_flags_of_repeated_columns_are_joined_and_states_spread_over_zeros():
    flags = spread_columns(torch.tensor([[1, 1, 3]]), torch.tensor([[True, False, True]]), 5)
    assert flags.tolist() == [[False, True, False, True, False]]
    states = spread_columns(torch.tensor([[2, 0]]), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), 4)
    assert states.tolist() == [[[3, 4], [0, 0], [1, 2], [0, 0]]]


def test_groups_know_their_sample_and_their_image_and_may_be_empty():
    labels = torch.tensor([[2, -1, 0, 2]])
    found = Groups.of_labels(labels, torch.tensor([0, 0, 0]), torch.tensor([5, 6, 7]))
    assert found.columns.tolist() == [[2, 0], [0, 0], [0, 3]]
    assert found.valid.tolist() == [[True, False], [False, False], [True, True]]
    assert found.rows.tolist() == [0, 0, 0] and found.images.tolist() == [5, 6, 7]
    none = Groups.of_labels(torch.full((1, 4), -1), torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))
    assert none.valid.shape == (0, 1) and none.gather(labels).shape == (0, 1)


def test_groups_gather_states_with_zeros_for_padding():
    states = torch.arange(32.0).view(2, 8, 2)
    gathered = groups().gather(states)
    assert gathered[1].tolist() == [[16, 17], [18, 19], [0, 0]]
    back = groups().scatter(-gathered, states)
    assert back[1, :5].tolist() == [[-16, -17], [-18, -19], [20, 21], [22, 23], [-24, -25]]


def test_whole_layouts_count_on_from_the_last_real_token():
    """After right padding, too."""
    real = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    before = SequenceLayout.whole(real, torch.zeros_like(real), torch.arange(10, 14)[None])
    assert before.positions.tolist() == [[10, 11, 12, 13]] * 2 and before.end.tolist() == [[12], [13]]
    assert before.merged_into.tolist() == [[0, 1, 2, 3]] * 2
    assert before.padding().tolist() == real.tolist()
    assert SequenceLayout.whole(torch.ones_like(real), real, torch.arange(4)[None]).padding() is None


def test_positions_of_three_axes_count_on_from_the_largest_of_all():
    axes = torch.tensor([[[0, 9, 1]], [[0, 2, 1]], [[0, 3, 4]]])
    last = torch.tensor([[2]])
    assert counted_from(axes, last).tolist() == [[9]]
    four = torch.cat([torch.tensor([[[0, 1, 2]]]), axes])  # with a row for text in front
    assert counted_from(four, last).tolist() == [[4]]
    assert counted_from(axes[0], last).tolist() == [[1]]
    assert last_axis(axes).tolist() == [[0, 3, 4]] and last_axis(axes[1]).tolist() == [[0, 2, 1]]


def test_a_sample_that_loses_nothing_keeps_its_positions_under_compaction():
    before = sequence()
    gaps = torch.tensor([[0, 0, 4, 5, 6, 7, 8, 20], [0, 1, 2, 3, 4, 5, 6, 7]])
    before = SequenceLayout.whole(before.real, before.visual, gaps)
    after, _ = cut(before, [[1, 1, 1], [1, 0, 0], [1, 0, 0]])
    assert after.positions[0][after.real[0]].tolist() == [4, 5, 6, 7, 8, 20] and after.end.tolist() == [[20], [6]]
    assert after.positions[1].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_hidden_tokens_stay_where_they_are_until_a_cut():
    before = sequence()
    keep = before.real & (torch.arange(8) != 4)
    masked = before.hide(keep, before.merged_into)
    assert masked.columns is before.columns and masked.dropped == 0
    assert masked.masked.nonzero().tolist() == [[0, 4], [1, 4]]
    assert masked.visual[0].nonzero()[:, 0].tolist() == [3, 5]
    assert masked.real[0].nonzero()[:, 0].tolist() == [2, 3, 5, 6, 7]
    assert masked.computed[0].nonzero()[:, 0].tolist() == [3, 4, 5]
    assert torch.equal(masked.present, before.real)
    again = masked.hide(masked.real & (torch.arange(8) != 5), before.merged_into)
    assert again.masked[0].nonzero()[:, 0].tolist() == [4, 5]
    after, _ = masked.cut(masked.real, before.merged_into, compact=False)
    assert after.columns[0][after.real[0]].tolist() == [2, 3, 5, 6, 7] and after.masked is None


def test_what_went_into_a_token_follows_it_through_the_next_cut():
    sources = torch.tensor([[1, 1, -1], [0, -1, -1], [0, -1, -1]])
    first, _ = cut(sequence(), [[0, 1, 0], [1, 0, 0], [1, 0, 0]], sources)
    assert first.merged_into[0, 3:6].tolist() == [4, 4, -1]
    labels = torch.where(first.columns == 4, torch.tensor([[0], [1]]), -1)
    survivors = Groups.of_labels(labels, torch.tensor([0, 1]), torch.tensor([0, 2]))
    keep = survivors.scatter(torch.tensor([[False], [True]]), first.real)
    after = first.merged_after(survivors, Selection(torch.tensor([[False], [True]])), keep)
    assert after[0].tolist() == [-1, -1, 2, -1, -1, -1, 6, 7]
    # the second sample loses nothing now, and column 1 stays lost
    assert after[1].tolist() == [0, -1, 2, 3, 4, 5, 6, 7]
    into = first.merged_after(survivors, Selection(torch.ones(2, 1, dtype=torch.bool)), first.real)
    assert into[0, 3:6].tolist() == [4, 4, -1]
