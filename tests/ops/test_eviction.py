# SPDX-License-Identifier: Apache-2.0
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtprune.ops.eviction import eviction_index


@given(st.integers(0, 10_000), st.integers(1, 20), st.data())
def test_finds_every_survivor_in_any_order(seed, n, data):
    generator = torch.Generator().manual_seed(seed)
    held = torch.stack([torch.randperm(30, generator=generator)[:n] for _ in range(2)])
    m = data.draw(st.integers(0, n))
    final = torch.stack([row[torch.randperm(n, generator=generator)[:m]] for row in held])
    final = torch.nn.functional.pad(final, (1, 0), value=-1)
    index = eviction_index(held, final)
    assert index[:, 0].tolist() == [-1, -1]
    assert torch.equal(held.gather(1, index[:, 1:]), final[:, 1:])


def test_cuts_one_after_another_compose():
    first, second = torch.tensor([[0, 2, 3, 5, 7]]), torch.tensor([[0, 3, 7]])
    assert eviction_index(torch.arange(8)[None], second).tolist() == second.tolist()
    assert eviction_index(first, second).tolist() == [[0, 2, 4]]
    assert eviction_index(first, torch.tensor([[3, 4, 9]])).tolist() == [[2, -1, -1]]
