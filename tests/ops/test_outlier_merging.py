# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune.ops.outlier_merging import even_steps, one_wide_head


def test_heads_become_one():
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(4, 8, generator=generator), torch.randn(11, 4, 8, generator=generator)
    rows = torch.einsum("hd,nhd->hn", queries, keys).div(8**0.5).softmax(-1)
    wide = (keys.flatten(1) @ queries.flatten()).div(32**0.5).softmax(-1)
    torch.testing.assert_close(one_wide_head(rows), wide)
    assert one_wide_head(torch.tensor([[1.0, 0.0], [1.0, 0.0]])).isfinite().all()


def test_strides():
    marked = even_steps(torch.tensor([2, 0, 40, 1]), torch.tensor([48, 48, 48, 20]), 48)
    assert marked[0].nonzero()[:, 0].tolist() == list(range(0, 47, 8))
    assert not marked[1].any()
    assert marked[2].all()
    assert marked[3].nonzero()[:, 0].tolist() == [0, 6, 12, 18]
