# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.ops.attention import attention_received, attention_rows
from vtprune.ops.attention_threshold import above_threshold, rising_threshold


@st.composite
def samples(draw):
    """Attention of a padded batch, masked as keys where a token is not alive."""
    batch, heads, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    alive = torch.rand(batch, tokens, generator=generator) < 0.7
    alive[:, draw(st.integers(0, tokens - 1))] = True
    logits = torch.randn(batch, heads, tokens, tokens, generator=generator) * draw(st.sampled_from([0.0, 1.0, 8.0]))
    return logits.masked_fill(~alive[:, None, None], -torch.inf).softmax(-1), alive


def mean_received(attention, alive):
    """(batch, tokens): mean over heads and the queries of tokens that are alive."""
    queries = alive.float()
    return torch.einsum("bhqk,bq->bk", attention, queries) / (queries.sum(1, keepdim=True) * attention.shape[1])


@given(samples(), st.floats(0, 3))
@settings(max_examples=80, deadline=None)
def test_higher_thresholds_keep_less_and_never_the_dead(sample, threshold):
    attention, alive = sample
    scores = mean_received(attention, alive)
    kept, more = above_threshold(scores, alive, threshold), above_threshold(scores, alive, threshold / 2)
    assert not (kept & ~alive).any() and not (kept & ~more).any()
    if threshold <= 0.99:
        assert kept.any(1).all()


def test_a_threshold_means_the_same_at_any_length():
    for tokens in (10, 1000):
        scores = torch.full((1, tokens), 1 / tokens)
        scores[0, 0] *= 0.4
        alive = torch.ones(1, tokens, dtype=torch.bool)
        assert above_threshold(scores, alive, 0.5).sum() == tokens - 1
    assert above_threshold(scores, alive, 0.01, reference_quirks=True).sum() == 0


def test_zero_prunes_just_what_receives_nothing():
    scores, alive = torch.tensor([[0.0, 1e-6, 0.5, 0.5]]), torch.ones(1, 4, dtype=torch.bool)
    assert above_threshold(scores, alive, 0.0).tolist() == [[False, False, True, True]]


def test_a_sample_without_tokens():
    dead = torch.zeros(1, 3, dtype=torch.bool)
    assert not above_threshold(torch.zeros(1, 3), dead, 0.5).any()


@pytest.mark.parametrize("layers", [4, 12, 28, 32, 80])
def test_schedules_go_evenly_from_nothing_to_the_end(layers):
    thresholds = [rising_threshold(1.0, layer, layers) for layer in range(layers)]
    assert thresholds[0] == 0 and thresholds[-1] == (layers - 1) / layers


def test_without_the_matrix_the_scores_are_the_same():
    """`attention_received` with a few rows at a time: grouped heads, a causal mask, padding, capped scores."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(2, heads, 9, 6, generator=generator) for heads in (4, 2))
    alive = torch.arange(9) >= torch.tensor([0, 3])[:, None]
    mask = torch.ones(9, 9, dtype=torch.bool).tril() & alive[:, None, None]
    whole = mean_received(attention_rows(queries, keys, scale=0.4, mask=mask, softcap=1.5), alive)
    received = attention_received(
        queries,
        keys,
        scale=0.4,
        mask=lambda first, last: mask[:, :, first:last],
        valid=alive,
        softcap=1.5,
        rows_at_once=4,
    )
    torch.testing.assert_close(received, whole)
    torch.testing.assert_close(received.sum(1), torch.ones(2))


@pytest.mark.parametrize("most", [1, 1 << 20])
def test_keys_that_no_row_sees_and_rows_that_see_no_key_add_nothing(most, monkeypatch):
    """`attention_received` with masks as wide as their rows see, in blocks of one head and of all: grouped heads, keys
    before the rows, padding, sinks."""
    monkeypatch.setattr("vtprune.ops.attention._AT_ONCE_ON_CPU", most)
    generator = torch.Generator().manual_seed(1)
    queries, keys = (torch.randn(2, heads, n, 6, generator=generator) for heads, n in ((4, 9), (2, 12)))
    alive = torch.arange(9) >= torch.tensor([0, 3])[:, None]
    seen = torch.cat([torch.ones(2, 3, dtype=torch.bool), alive], 1)[:, None, None]
    mask = torch.ones(9, 12, dtype=torch.bool).tril(3) & seen
    mask[1, :, :3] = False  # these rows are padding, and see not even what came before
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0])
    keys[1, :, 3:6] = torch.nan  # so are these keys
    whole = attention_rows(queries, keys, scale=0.4, mask=mask, sinks=sinks)
    received = attention_received(
        queries,
        keys,
        scale=0.4,
        mask=lambda first, last: mask[:, :, first:last, : last + 3],
        valid=alive,
        sinks=sinks,
        rows_at_once=4,
    )
    expected = (whole.mean(1) * alive[..., None]).sum(1) / alive.sum(1, keepdim=True)
    torch.testing.assert_close(received, expected)
