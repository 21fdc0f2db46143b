# SPDX-License-Identifier: Apache-2.0
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtprune.stages.layout import Groups, SequenceLayout, compact_columns, take_columns
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


def test_merged_tokens_share_the_fate_of_their_representative():
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
