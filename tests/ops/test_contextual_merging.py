# SPDX-License-Identifier: Apache-2.0
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from vtprune.ops.contextual_merging import merge_contextual


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(features, keys, salient, count):
    """One group without padding: kept places with their new features, and the token that each token went into."""
    rest = [token for token in range(len(features)) if not salient[token]]
    count = min(count, len(rest))
    step = max(1, len(rest) // max(count, 1))
    centres = rest[::step][:count]
    into = {token: token for token in range(len(features)) if salient[token]}
    for token in rest:
        alike = [float(cosine_similarity(keys[token], keys[centre], dim=0)) for centre in centres]
        into[token] = token if token in centres else centres[alike.index(max(alike))] if centres else -1
    kept = sorted(set(into.values()) - {-1})
    means = [features[[token for token in into if into[token] == place]].mean(0) for place in kept]
    return kept, means, [into[token] for token in range(len(features))]


groups = given(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.integers(0, 8), st.integers(0, 10_000))


def batch(lengths, seed):
    tokens = max(max(lengths), 1)
    valid = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    features, keys = draw(len(lengths), tokens, 3, seed=seed), draw(len(lengths), tokens, 4, seed=seed + 1)
    salient = draw(len(lengths), tokens, seed=seed + 2) > 0.7
    return features * valid[..., None], keys, salient, valid


@groups
@settings(max_examples=80, deadline=None)
def test_each_group_of_a_padded_batch_is_merged_as_by_hand(lengths, count, seed):
    features, keys, salient, valid = batch(lengths, seed)
    counts = (torch.arange(len(lengths)) + count) % 9
    keep, merged, sources = merge_contextual(features, keys, salient, valid, counts)
    for group, length in enumerate(lengths):
        alone = features[group, :length], keys[group, :length], salient[group, :length]
        kept, means, into = by_hand(*alone, int(counts[group]))
        assert keep[group].nonzero()[:, 0].tolist() == kept
        assert sources[group].tolist() == into + [-1] * (keep.shape[1] - length)
        if kept:
            torch.testing.assert_close(merged[group, kept], torch.stack(means))


@groups
@settings(max_examples=60, deadline=None)
def test_the_reference_adds_the_mean_of_the_others_to_the_centre(lengths, count, seed):
    features, keys, salient, valid = batch(lengths, seed)
    counts = torch.full((len(lengths),), count)
    keep, merged, sources = merge_contextual(features, keys, salient, valid, counts, reference_quirks=True)
    sane = merge_contextual(features, keys, salient, valid, counts)
    assert torch.equal(keep, sane[0]) and torch.equal(sources, sane[2])
    for group, place in keep.nonzero().tolist():
        others = (sources[group] == place).index_fill(0, torch.tensor(place), False)
        joined = features[group, others].mean(0) if others.any() else 0
        torch.testing.assert_close(merged[group, place], features[group, place] + joined)


def test_zero_keys_equal_tokens_and_half_precision():
    half = torch.full((1, 40, 2), 60000.0, dtype=torch.float16)
    everything = torch.ones(1, 40, dtype=torch.bool)
    keep, merged, sources = merge_contextual(half, torch.zeros(1, 40, 3), ~everything, everything, torch.tensor([4]))
    assert keep[0].nonzero()[:, 0].tolist() == [0, 10, 20, 30]
    assert merged.dtype == torch.float16 and torch.equal(merged, half)
    assert [int((sources == place).sum()) for place in (0, 10, 20, 30)] == [37, 1, 1, 1]
