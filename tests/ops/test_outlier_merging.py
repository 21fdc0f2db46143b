# SPDX-License-Identifier: Apache-2.0
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtprune.ops.outlier_merging import even_steps, evenly_among, one_wide_head


def test_heads_become_one():
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(4, 8, generator=generator), torch.randn(11, 4, 8, generator=generator)
    rows = torch.einsum("hd,nhd->hn", queries, keys).div(8**0.5).softmax(-1)
    wide = (keys.flatten(1) @ queries.flatten()).div(32**0.5).softmax(-1)
    torch.testing.assert_close(one_wide_head(rows), wide)
    assert one_wide_head(torch.tensor([[1.0, 0.0], [1.0, 0.0]])).isfinite().all()


@given(data=st.data())
def test_evenly(data):
    flags = data.draw(st.lists(st.booleans(), min_size=1, max_size=40))
    k = data.draw(st.integers(0, 45))
    others = torch.tensor([flags])
    marked = evenly_among(others, torch.tensor([k]))
    assert int(marked.sum()) == min(k, sum(flags)) and not (marked & ~others).any()
    ranks = (others.cumsum(1) - 1)[marked]
    steps = ranks.diff()
    assert not len(steps) or int(steps.max() - steps.min()) <= 1


def test_strides():
    marked = even_steps(torch.tensor([2, 0, 40, 1]), torch.tensor([48, 48, 48, 20]), 48)
    assert marked[0].nonzero()[:, 0].tolist() == list(range(0, 47, 8))
    assert not marked[1].any()
    assert marked[2].all()
    assert marked[3].nonzero()[:, 0].tolist() == [0, 6, 12, 18]
