# SPDX-License-Identifier: Apache-2.0
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtprune.ops.random_block import rectangle

inside = st.floats(0, 1, exclude_max=True)


def test_a_square_in_each_corner():
    assert rectangle(4, 4, 4, 0, 0).tolist() == [0, 1, 4, 5]
    assert rectangle(4, 4, 4, 0.99, 0).tolist() == [8, 9, 12, 13]
    assert rectangle(4, 4, 4, 0, 0.99).tolist() == [2, 3, 6, 7]


def test_the_shape_is_that_of_the_grid():
    assert rectangle(2, 8, 4, 0, 0).tolist() == [0, 1, 2, 3]
    assert rectangle(8, 2, 4, 0, 0).tolist() == [0, 2, 4, 6]


def test_the_last_row_lacks_the_rest():
    assert rectangle(5, 5, 7, 0, 0).tolist() == [0, 1, 2, 5, 6, 7, 10]


@given(st.integers(1, 12), st.integers(1, 12), st.data(), inside, inside)
def test_exactly_k_patches_in_one_box(rows, cols, data, down, right):
    k = data.draw(st.integers(0, rows * cols))
    places = rectangle(rows, cols, k, down, right)
    assert places.tolist() == sorted(set(places.tolist())) and len(places) == k
    if k:
        assert int(places.min()) >= 0 and int(places.max()) < rows * cols
        y, x = torch.div(places, cols, rounding_mode="floor"), places % cols
        box = (int(y.max() - y.min()) + 1) * (int(x.max() - x.min()) + 1)
        assert box - k < int(x.max() - x.min()) + 1, "more than the last row is missing"


def test_every_place_can_be_drawn():
    tops = {int(rectangle(6, 6, 9, (i + 0.5) / 40, 0)[0]) // 6 for i in range(40)}
    assert tops == {0, 1, 2, 3}
