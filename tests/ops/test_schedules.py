# SPDX-License-Identifier: Apache-2.0
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from vtprune.ops.schedules import linear_decay


@given(st.integers(0, 30), st.integers(1, 30), st.integers(1, 40), st.integers(0, 5000))
def test_falls_in_equal_steps_from_all_to_none(full, span, depth, entering):
    counts = linear_decay(full, full + span, depth, entering)
    assert len(counts) == depth
    for layer, count in enumerate(counts):
        share = 1 - Fraction(max(layer - full, 0), span)
        assert count == int(entering * max(share, 0))


def test_the_published_schedule_of_28_layers():
    counts = linear_decay(14, 22, 28, 80)
    assert counts == [80] * 15 + [70, 60, 50, 40, 30, 20, 10] + [0] * 6
