# SPDX-License-Identifier: Apache-2.0
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.ops.emission import NEWLINE, reading_order, with_newlines


@given(st.integers(0, 6), st.integers(1, 5), st.integers(1, 5), st.floats(0, 1), st.integers(0, 10_000))
@settings(max_examples=80, deadline=None)
def test_a_newline_ends_every_row_of_which_something_is_left(frames, rows, columns, share, seed):
    generator = torch.Generator().manual_seed(seed)
    part = torch.randint(3, (frames, rows * columns), generator=generator)
    part[torch.rand(part.shape, generator=generator) > share] = -1
    expected = []
    for line in range(frames * rows):
        kept = [i for i in range(line * columns, (line + 1) * columns) if part.flatten()[i] >= 0]
        expected += [*kept, NEWLINE] if kept else []
    order = reading_order(part)
    assert with_newlines(order, columns).tolist() == expected
    assert with_newlines(order).tolist() == [*order.tolist(), NEWLINE]
    by_part = reading_order(part, by_part=True).tolist()
    assert by_part == sorted(order.tolist(), key=lambda i: (i // part.shape[1], part.flatten()[i].item(), i))


def test_merged_tokens_lead_their_frame():
    part = torch.tensor([[1, -1, 0, 2, 1], [2, 1, -1, 1, 0]])
    assert reading_order(part).tolist() == [0, 2, 3, 4, 5, 6, 8, 9]
    assert reading_order(part, by_part=True).tolist() == [2, 0, 4, 3, 9, 6, 8, 5]


def test_a_newline_is_the_feature_appended():
    part = torch.tensor([[0, -1, -1, -1, -1, 0]])
    order = with_newlines(reading_order(part), 2)
    features = torch.cat((torch.arange(6.0)[:, None], torch.tensor([[99.0]])))
    assert features[order, 0].tolist() == [0, 99, 5, 99]
