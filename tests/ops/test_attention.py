# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vtprune.ops.attention import attention_rows


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_grouped_heads_equal_repeated_keys(kv_heads):
    queries, keys = random(2, 8, 3, 16), random(2, kv_heads, 11, 16, seed=1)
    rows = attention_rows(queries, keys, scale=0.25)
    repeated = keys.repeat_interleave(8 // kv_heads, dim=1)
    expected = (queries @ repeated.transpose(-1, -2) * 0.25).softmax(-1)
    torch.testing.assert_close(rows, expected)


def test_rows_are_those_of_the_full_causal_matrix():
    queries, keys = random(1, 4, 9, 8), random(1, 4, 9, 8, seed=1)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    full = attention_rows(queries, keys, scale=8**-0.5, mask=causal[None, None])
    chosen = torch.tensor([2, 5, 8])
    some = attention_rows(queries[:, :, chosen], keys, scale=8**-0.5, mask=causal[None, None, chosen])
    torch.testing.assert_close(some, full[:, :, chosen])
    values = torch.eye(9).expand(1, 4, 9, 9)
    reference = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    torch.testing.assert_close(full, reference)


def test_masked_keys_get_nothing_and_an_empty_row_is_zero():
    queries, keys = random(2, 4, 3, 8), random(2, 2, 6, 8, seed=1)
    mask = torch.ones(2, 1, 3, 6, dtype=torch.bool)
    mask[0, :, :, 4:] = False
    mask[1, :, 1] = False
    rows = attention_rows(queries, keys, scale=1.0, mask=mask)
    assert not rows[0, :, :, 4:].any() and not rows[1, :, 1].any()
    sums = rows.sum(-1)
    torch.testing.assert_close(sums, mask.any(-1).float().expand_as(sums))
    torch.testing.assert_close(
        rows[:1], torch.nn.functional.pad(attention_rows(queries[:1], keys[:1, :, :4], scale=1.0), (0, 2))
    )


def test_a_mask_may_differ_between_heads():
    queries, keys = random(1, 4, 2, 8), random(1, 2, 5, 8, seed=1)
    mask = torch.ones(1, 4, 2, 5, dtype=torch.bool)
    mask[0, 3, :, 0] = False
    rows = attention_rows(queries, keys, scale=1.0, mask=mask)
    assert not rows[0, 3, :, 0].any() and rows[0, :3, :, 0].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_give_float32_rows(dtype):
    queries, keys = random(1, 4, 2, 16).to(dtype), random(1, 4, 700, 16, seed=1).to(dtype)
    rows = attention_rows(queries, keys, scale=0.25)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, attention_rows(queries.float(), keys.float(), scale=0.25))


def test_inputs_are_left_as_they_were():
    queries, keys = random(1, 2, 3, 4), random(1, 2, 5, 4, seed=1)
    before = queries.clone(), keys.clone()
    attention_rows(queries, keys, scale=0.5, mask=torch.zeros(1, 1, 3, 5, dtype=torch.bool))
    assert torch.equal(queries, before[0]) and torch.equal(keys, before[1])


def test_sinks_take_their_share_and_have_no_column():
    queries, keys, sinks = random(2, 4, 3, 8), random(2, 2, 5, 8, seed=1), torch.tensor([0.5, -1.0, 3.0, 0.0])
    mask = torch.ones(3, 5, dtype=torch.bool).tril(1)
    mask[1] = False
    rows = attention_rows(queries, keys, scale=0.3, mask=mask[None, None], sinks=sinks)
    scores = queries @ keys.repeat_interleave(2, dim=1).transpose(-1, -2) * 0.3
    exponents = scores.exp() * mask
    expected = exponents / (exponents.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    torch.testing.assert_close(rows, expected)
    assert not rows[:, :, 1].any()
