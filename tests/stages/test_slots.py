# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.stages.slots import CacheContents, PerSample, PromptTable, Slots, Stored


def table(first: int = 10, **fields) -> PromptTable:
    """A prompt of four columns from column 10 of the sequence on, of two samples."""
    facts = dict(
        prunable=torch.tensor([[False, True, True, False], [True, True, False, False]]),
        positions=torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]),
        blocks=None,
        deepstack={},
        counts=torch.tensor([[2], [1]]),
        contents=CacheContents(),
    )
    return PromptTable(first=first, **facts | fields)


def test_places_are_the_nearest_columns_of_the_prompt():
    assert table().places(torch.tensor([[-1, 3, 10, 12, 13, 20]])).tolist() == [[0, 0, 0, 2, 3, 3]]


def test_values_beyond_the_prompt_are_the_other_one():
    columns = torch.tensor([[-1, 9, 11, 13, 14], [10, 10, 12, -1, 30]])
    assert table().look_up(table().prunable, columns, False).tolist() == [
        [False, False, True, False, False],
        [True, True, False, False, False],
    ]
    numbers = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
    assert table().look_up(numbers, columns, -9).tolist() == [[-9, -9, 6, 8, -9], [1, 1, 3, -9, -9]]
    assert table(first=0).look_up(numbers, torch.tensor([[-1], [0]]), -9).tolist() == [[-9], [1]]


def test_positions_of_columns_on_one_axis_and_on_three():
    columns = torch.tensor([[11, 13], [10, 12]])
    assert table().positions_of(columns).tolist() == [[1, 3], [4, 6]]
    axes = torch.stack([table().positions + step for step in (0, 10, 20)], 1)
    assert axes.shape == (2, 3, 4)
    found = table(positions=axes).positions_of(columns)
    assert found.tolist() == [[[1, 3], [4, 6]], [[11, 13], [14, 16]], [[21, 23], [24, 26]]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Example(PerSample):
    values: Tensor
    by_layer: dict
    inner: Slots
    name: str = "as it was"


def repeated(state: PerSample, repeats: int):
    return state.derive("repeat", repeats, lambda t: t.repeat_interleave(repeats, 0))


def test_all_that_has_a_batch_follows_it_and_the_rest_stays():
    slots = Slots(columns=torch.tensor([[1, 2], [3, -1]]), table=table())
    example = Example(values=torch.tensor([5, 6]), by_layer={2: torch.tensor([[7], [8]]), "n": 3}, inner=slots)
    twice = repeated(example, 2)
    assert twice.values.tolist() == [5, 5, 6, 6] and twice.name == "as it was"
    assert twice.by_layer[2].tolist() == [[7], [7], [8], [8]] and twice.by_layer["n"] == 3
    assert twice.inner.columns.tolist() == [[1, 2], [1, 2], [3, -1], [3, -1]]
    assert twice.inner.table.counts.tolist() == [[2], [2], [1], [1]] and twice.inner.table.first == 10
    assert example.values.tolist() == [5, 6]


def test_what_layers_share_they_still_share_after_the_same_step():
    beams = torch.tensor([1, 0])
    slots = Slots(columns=torch.tensor([[1, 2], [3, 4]]), table=table())
    one, other = (slots.derive("reorder", beams, lambda t: t[beams]) for layer in range(2))
    assert one is other and one.table is other.table
    assert slots.derive("reorder", torch.tensor([1, 0]), lambda t: t[beams]) is not one  # another step


def test_contents_that_nobody_changed_are_those_of_the_prefill():
    assert CacheContents().of([torch.tensor([1, 2])]) == (None, 0)


def test_contents_are_the_visual_columns_of_each_layer_in_order():
    contents = CacheContents(columns=[torch.tensor([[5, 1, -1, 2, 9]]), torch.tensor([[-1, -1, 2, 9, 10]])])
    in_cache, stored = contents.of([torch.tensor([1, 2, 3, 5])])
    assert [[columns.tolist() for columns in layer] for layer in in_cache] == [[[1, 2, 5]], [[2]]]
    assert stored == 0


def test_one_beam_stands_for_all_and_padding_takes_no_bytes():
    """Two samples, each twice; 8 bytes for a stored token of one cut, 12 for one of another."""
    contents = CacheContents(
        columns=[torch.tensor([[1, 2], [7, 7], [4, -1], [7, 7]])],
        stored=[(torch.tensor([[3, 5], [7, 7], [-1, 6], [7, 7]]), 8), (torch.tensor([[-1], [-1], [9], [-1]]), 12)],
    )
    in_cache, stored = contents.of([torch.tensor([1, 2, 3]), torch.tensor([4, 6])])
    assert [columns.tolist() for columns in in_cache[0]] == [[1, 2], [4]]
    assert stored == 3 * 8 + 1 * 12


def test_stored_tokens_follow_their_samples():
    stored = Stored(hidden=torch.tensor([[[1.0]], [[2.0]]]), columns=torch.tensor([[3], [-1]]))
    twice = repeated(stored, 2)
    assert twice.hidden.flatten().tolist() == [1, 1, 2, 2] and twice.columns.flatten().tolist() == [3, 3, -1, -1]
