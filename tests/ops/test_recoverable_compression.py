# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune import VTPruneError
from vtprune.ops import recoverable_compression as module
from vtprune.ops.recoverable_compression import (
    counts_within,
    dynamic_counts,
    gather_rest,
    lowered,
    main_tokens,
    text_scores,
)


def image(tokens, seed=0, dim=6, key_dim=5):
    """Features, keys, visual scores like attention (a few large ones) and text scores."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(tokens, dim, generator=generator)
    keys = torch.randn(tokens, key_dim, generator=generator)
    visual = (torch.randn(tokens, generator=generator) * 2).softmax(0)
    text = torch.randn(tokens, generator=generator) ** 3 / 100
    return features, keys, visual, text


def recover(features, keys, visual, text, k=None):
    counts = counts_within(visual, text, keys.shape[1], k).tolist()
    return module.recover(features, keys, visual, text, counts)


@given(st.integers(0, 10_000), st.integers(1, 60), st.data())
@settings(max_examples=80, deadline=None)
def test_kept_by_vision_first_then_by_text_without_repetition(seed, tokens, data):
    _, _, visual, text = image(tokens, seed)
    by_vision = data.draw(st.integers(0, tokens))
    by_text = data.draw(st.integers(0, tokens))
    keep = main_tokens(visual, text, by_vision, by_text)
    assert keep.sum() == min(by_vision + by_text, tokens)
    seen = main_tokens(visual, text, by_vision, 0)
    assert seen.sum() == by_vision and not (seen & ~keep).any()
    if by_vision and not seen.all():
        assert visual[seen].min() >= visual[~seen].max()
    added = keep & ~seen
    if added.any() and not keep.all():
        assert text[added].min() >= text[~keep].max()
    assert (lowered(text, seen)[seen] == text.min()).all()


@given(st.integers(0, 10_000), st.integers(0, 60), st.integers(1, 8), st.data())
@settings(max_examples=80, deadline=None)
def test_the_rest_is_gathered_as_defined(seed, tokens, members, data):
    features, keys, visual, text = image(tokens, seed)
    keep = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.4
    centres = data.draw(st.integers(0, 10))
    remainder = data.draw(st.booleans())
    merged = gather_rest(
        features,
        keys,
        visual,
        text,
        keep,
        int(keep.sum()),
        centres,
        remainder=remainder,
        members=members,
        text_weight=50,
    )
    kept, rest = keep.nonzero()[:, 0].tolist(), (~keep).nonzero()[:, 0].tolist()
    best = sorted(rest, key=lambda token: -visual[token].item())[:centres]
    others = [token for token in rest if token not in best]
    with_remainder = remainder and bool(others)
    places = merged.places[0].tolist()
    assert places[: len(kept) + len(best)] == kept + best
    assert torch.equal(merged.features[0, : len(kept)], features[keep])
    sources, taken = merged.sources[0].tolist(), set()
    for row, centre in enumerate(best, start=len(kept)):
        affinity = {
            token: torch.cosine_similarity(keys[centre], keys[token], dim=0).item() + 50 * text[token].item()
            for token in rest
            if token != centre
        }
        circle = sorted(affinity, key=affinity.get, reverse=True)[:members]
        gathered = features[centre] + sum(visual[token] * features[token] for token in circle)
        torch.testing.assert_close(merged.features[0, row], gathered, rtol=1e-4, atol=1e-5)
        stand_in = places[-1] if with_remainder else None
        assert all(sources[token] == centre for token in circle if token not in taken | {*best, stand_in})
        taken |= set(circle)
    assert len(places) == len(kept) + len(best) + with_remainder
    if with_remainder:
        left = sum(visual[token] * features[token] for token in others)
        torch.testing.assert_close(merged.features[0, -1], left, rtol=1e-4, atol=1e-5)
        assert places[-1] == max(others, key=lambda token: visual[token].item())
    lost = {token for token in rest if sources[token] < 0}
    assert lost == (set() if with_remainder else set(others) - taken)
    assert all(sources[place] == place for place in places)


@given(st.integers(0, 10_000), st.integers(0, 80), st.data())
@settings(max_examples=80, deadline=None)
def test_budgets_are_met_and_everything_is_somewhere(seed, tokens, data):
    k = data.draw(st.integers(0, tokens))
    features, keys, visual, text = image(tokens, seed)
    merged = recover(features, keys, visual, text, k)
    places = merged.places[0]
    assert len(set(places.tolist())) == len(places) == k
    assert merged.features.shape == (1, k, features.shape[1]) and merged.features.isfinite().all()
    assert set(merged.sources[0].tolist()) - {-1} == set(places.tolist())
    keep, in_place, _ = merged.in_place(features[None])
    assert keep.sum() == k
    if k == tokens:
        assert torch.equal(in_place[0], features)


def test_a_budget_keeps_the_published_proportions():
    features, keys, visual, text = image(576, seed=3)
    by_vision, by_text, centres = dynamic_counts(visual, text, 6).tolist()
    assert min(by_vision, by_text, centres) > 5
    published = recover(features, keys, visual, text)
    total = by_vision + by_text + centres + 1
    assert published.places.shape[1] == total
    same = recover(features, keys, visual, text, total)
    assert torch.equal(same.places, published.places) and torch.equal(same.features, published.features)
    half = recover(features, keys, visual, text, total // 2)
    kept = main_tokens(visual, text, by_vision, by_text)
    assert abs((half.places[0].sort().values[:, None] == kept.nonzero()[:, 0]).any(1).sum() - kept.sum() / 2) < 8


def test_the_order_of_the_tokens_does_not_matter():
    features, keys, visual, text = image(200, seed=5)
    shuffle = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    plain = recover(features, keys, visual, text)
    shuffled = recover(features[shuffle], keys[shuffle], visual[shuffle], text[shuffle])
    assert sorted(shuffle[shuffled.places[0]].tolist()) == sorted(plain.places[0].tolist())
    torch.testing.assert_close(shuffled.features[0].sum(0), plain.features[0].sum(0))


def test_shares_become_counts_without_losing_one_to_rounding():
    # One outlier of 49: 1 / 49 * 49 is slightly below 1.
    visual = torch.cat((torch.linspace(0, 1, 48), torch.tensor([50.0])))
    assert dynamic_counts(visual, torch.zeros(49), 4)[0] == 1
    assert dynamic_counts(visual, torch.zeros(49), 4, reference_quirks=True)[0] == 0


def test_equal_scores_single_tokens_and_what_cannot_be_ranked():
    features, keys, _, _ = image(40)
    flat = torch.full((40,), 1 / 40)
    assert recover(features, keys, flat, flat).places.shape == (1, 0)
    assert recover(features, keys, flat, flat, 7).places[0].tolist() == list(range(7))
    assert recover(*(part[:1] for part in image(40)), 1).places.tolist() == [[0]]
    broken = flat.clone()
    broken[3] = torch.nan
    for scores in ((broken, flat), (flat, broken)):
        with pytest.raises(VTPruneError, match="NaN or infinite"):
            recover(features, keys, *scores)


def test_text_scores_and_low_precision():
    features, keys, visual, text = image(100)
    query = features[17]
    scores = text_scores(query, features)
    assert scores.argmax() == 17 and scores[17] == pytest.approx(6**-0.5)
    merged = recover(features.half(), keys.half(), visual, text, 30)
    assert merged.features.dtype == torch.float16 and merged.features.isfinite().all()
