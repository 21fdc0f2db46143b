# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.ops import page_rank as module
from vtprune.ops.page_rank import attention_ranks, over_heads


def draw(batch=2, heads=4, kv_heads=2, n=9, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, n, dim, generator=generator), torch.randn(
        batch, kv_heads, n, dim, generator=generator
    )


def importance(*args, **options):
    return over_heads(attention_ranks(*args, **options))


def ranks_of(transitions, **options):
    """Ranks for given transitions (batch, heads, n, n), as the attention of queries and keys made to have them."""
    keys = torch.eye(transitions.shape[-1]).expand_as(transitions)
    queries = transitions.clamp_min(1e-30).log()
    return attention_ranks(queries, keys, scale=1.0, mask=(transitions > 0)[:, :1], temperature=1.0, **options)


def causal(n):
    return torch.ones(1, 1, n, n, dtype=torch.bool).tril()


def written_out(queries, keys, mask, temperature=0.1, iterations=5, damping=0.0):
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1).double()
    logits = queries.double() @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    transitions = logits.masked_fill(~mask, -torch.inf).div(temperature).softmax(-1)
    ranks = torch.full((*transitions.shape[:2], 1, transitions.shape[-1]), 1 / transitions.shape[-1]).double()
    for _ in range(iterations):
        ranks = (1 - damping) * ranks @ transitions + damping / transitions.shape[-1]
    return ranks[:, :, 0].square().mean(1).sqrt().float()


@given(st.integers(0, 10_000), st.integers(1, 12), st.floats(0, 1), st.floats(0.1, 2), st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_is_the_formula(seed, n, damping, temperature, iterations):
    queries, keys = draw(n=n, seed=seed)
    options = dict(temperature=temperature, iterations=iterations, damping=damping)
    ranks = importance(queries, keys, scale=6**-0.5, mask=causal(n), **options)
    torch.testing.assert_close(ranks, written_out(queries, keys, causal(n), **options), rtol=1e-4, atol=1e-5)


def test_ranks_stay_a_distribution():
    transitions = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).mul(5).softmax(-1)
    valid = torch.arange(8) < torch.tensor([8, 5])[:, None]
    transitions[1] *= valid[1].float()
    transitions[1] /= transitions[1].sum(-1, keepdim=True)
    for damping in (0.0, 0.3, 1.0):
        ranks = ranks_of(transitions, valid=valid, damping=damping)
        torch.testing.assert_close(ranks.sum(-1), torch.ones(2, 3))
        assert not ranks[1, :, 5:].any()
    torch.testing.assert_close(ranks_of(transitions, iterations=0), torch.full((2, 3, 8), 1 / 8))


def test_ranks_begin_as_they_are_told_to():
    transitions = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    start = torch.rand(2, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ranks_of(transitions, iterations=0, start=start), start[:, None].expand(2, 3, 6))
    once = ranks_of(transitions, iterations=1, start=start[:1], damping=0.25)
    expected = 0.75 * torch.einsum("n,bhnm->bhm", start[0], transitions) + 0.25 / 6
    torch.testing.assert_close(once, expected)


def test_only_the_heads_that_count_count():
    ranks, counted = draw(n=5)[0].abs()[:, :3, :, 0], torch.tensor([[True, False, True], [True, True, True]])
    expected = torch.stack([ranks[0, [0, 2]].square().mean(0).sqrt(), ranks[1].square().mean(0).sqrt()])
    torch.testing.assert_close(over_heads(ranks, counted), expected)
    torch.testing.assert_close(over_heads(ranks), over_heads(ranks, torch.ones(2, 3, dtype=torch.bool)))


def test_importance_goes_where_attention_goes():
    transitions = torch.zeros(1, 1, 6, 6)
    transitions[..., 2] = 1
    assert ranks_of(transitions)[0, 0].tolist() == [0, 0, 1, 0, 0, 0]
    # A ring passes the ranks around; no rank changes.
    ring = torch.eye(6).roll(1, dims=1)[None, None]
    torch.testing.assert_close(ranks_of(ring), torch.full((1, 1, 6), 1 / 6))


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing_and_has_no_rank(left):
    queries, keys = draw(batch=1, n=7)
    alone = importance(queries, keys, scale=1.0, mask=causal(7), damping=0.1)
    sides = (3, 0) if left else (0, 3)
    valid = torch.nn.functional.pad(torch.ones(1, 7, dtype=torch.bool), sides)
    queries, keys = (torch.nn.functional.pad(x, (0, 0, *sides), value=2.0) for x in (queries, keys))
    mask = causal(10) & valid[:, None, None]
    padded = importance(queries, keys, scale=1.0, mask=mask, valid=valid, damping=0.1)
    torch.testing.assert_close(padded[valid], alone[0])
    assert not padded[~valid].any()


def test_hidden_tokens_have_no_importance_but_begin_with_a_rank():
    queries, keys = draw(batch=1)
    visible = torch.ones(9, dtype=torch.bool)
    visible[[2, 5]] = False
    mask = causal(9) & visible
    hidden = importance(queries, keys, scale=0.5, mask=mask)
    assert not hidden[0, ~visible].any()
    removed = importance(queries[:, :, visible], keys[:, :, visible], scale=0.5, mask=causal(7))
    assert not torch.allclose(hidden[0, visible], removed[0], rtol=1e-3)
    # Tokens that start without a rank have no effect, as if they were removed.
    ignored = importance(queries, keys, scale=0.5, mask=mask, valid=visible[None])
    torch.testing.assert_close(ignored[0, visible], removed[0])


def test_samples_and_softcap():
    queries, keys = draw(batch=3)
    options = dict(scale=0.4, mask=causal(9), softcap=1.5)
    together = importance(queries, keys, **options)
    alone = [importance(queries[i : i + 1], keys[i : i + 1], **options)[0] for i in range(3)]
    torch.testing.assert_close(together, torch.stack(alone))
    capped = 1.5 * torch.tanh(queries @ keys.repeat_interleave(2, dim=1).transpose(-1, -2) * 0.4 / 1.5)
    transitions = capped.masked_fill(~causal(9), -torch.inf).div(0.1).softmax(-1)
    torch.testing.assert_close(together, over_heads(ranks_of(transitions)))
    half = importance(queries.bfloat16(), keys.bfloat16(), **options)
    assert half.dtype == torch.float32 and half.isfinite().all()


@pytest.mark.parametrize("as_function", [True, False])
def test_many_tokens_come_in_blocks_of_rows(monkeypatch, as_function):
    queries, keys = draw(n=11)
    mask = causal(11)
    whole = importance(queries, keys, scale=0.4, mask=mask, damping=0.1)
    asked = []

    def rows(first, last):
        asked.append((first, last))
        return mask[..., first:last, :]

    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 2 * 11 * 4)
    blocks = importance(queries, keys, scale=0.4, mask=rows if as_function else mask, damping=0.1)
    torch.testing.assert_close(blocks, whole)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 2 * 11 * 11 * 3)
    torch.testing.assert_close(importance(queries, keys, scale=0.4, mask=mask, damping=0.1), whole)
    assert set(asked) == ({(0, 4), (4, 8), (8, 11)} if as_function else set())


def test_what_goes_to_the_past_is_lost():
    queries, keys = draw(n=9)
    own = queries[:, :, 3:]
    ranks = importance(own, keys, scale=0.4, mask=causal(9)[:, :, 3:], iterations=1, temperature=1.0)
    scores = own @ keys.repeat_interleave(2, dim=1).transpose(-1, -2) * 0.4
    transitions = scores.masked_fill(~causal(9)[:, :, 3:], -torch.inf).softmax(-1)
    torch.testing.assert_close(ranks, transitions[..., 3:].mean(2).square().mean(1).sqrt())
