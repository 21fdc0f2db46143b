# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.ops.window_merging import window_merging, window_similarity


def smooth(images, rows, columns, dim=6, prefix=0, seed=0):
    """Features that are similar in some regions, so some windows are above a threshold and some below."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(images, dim, rows // 3 + 1, columns // 3 + 1, generator=generator)
    noise = torch.rand(images, 1, rows // 3 + 1, columns // 3 + 1, generator=generator)
    coarse, noise = (t.repeat_interleave(3, 2).repeat_interleave(3, 3)[..., :rows, :columns] for t in (coarse, noise))
    features = coarse + noise * torch.randn(images, dim, rows, columns, generator=generator)
    features = features.flatten(2).transpose(1, 2)
    return torch.cat((torch.randn(images, prefix, dim, generator=generator), features), dim=1)


def mean_cosine(tokens):
    cosines = [
        torch.cosine_similarity(a, b, dim=0) for i, a in enumerate(tokens) for j, b in enumerate(tokens) if i != j
    ]
    return torch.stack(cosines).mean()


@given(
    st.integers(0, 10_000), st.integers(1, 11), st.integers(1, 11), st.sampled_from([(3, 3), (2, 2), (1, 3), (4, 2)])
)
@settings(max_examples=40, deadline=None)
def test_windows_that_pass_become_their_mean(seed, rows, columns, window):
    features = smooth(1, rows, columns, prefix=1, seed=seed)
    merged = window_merging(features, (rows, columns), window, threshold=0.6, prefix=1)
    raster = 1 + torch.arange(rows * columns).view(rows, columns)
    expected = torch.arange(features.shape[1])
    centres = {}
    for top in range(0, rows - window[0] + 1, window[0]):
        for left in range(0, columns - window[1] + 1, window[1]):
            cell = raster[top : top + window[0], left : left + window[1]]
            members = features[0, cell.flatten()]
            similarity = mean_cosine(members)
            torch.testing.assert_close(window_similarity(features, cell.reshape(1, -1))[0, 0], similarity)
            if similarity >= 0.6:
                centre = int(cell[(window[0] - 1) // 2, (window[1] - 1) // 2])
                expected[cell.flatten()] = centre
                centres[centre] = members.mean(0)
    assert merged.sources[0].tolist() == expected.tolist()
    assert merged.places[0].tolist() == sorted(set(expected.tolist()))
    for row, place in enumerate(merged.places[0].tolist()):
        torch.testing.assert_close(merged.features[0, row], centres.get(place, features[0, place]))
    assert merged.sizes.sum() == features.shape[1]


def test_images_of_a_batch_are_what_they_are_alone_unless_the_quirk_is_asked_for():
    features = smooth(4, 9, 9)
    together = window_merging(features, (9, 9))
    counts = together.valid.sum(1).tolist()
    assert len(set(counts)) > 1
    for image in range(4):
        alone = window_merging(features[image : image + 1], (9, 9))
        torch.testing.assert_close(together.features[image, : counts[image]], alone.features[0])
        assert torch.equal(together.sources[image], alone.sources[0])
        assert not together.features[image, counts[image] :].any()
    quirky = window_merging(features, (9, 9), reference_quirks=True)
    assert quirky.valid.all() and quirky.features.shape[1] == max(counts)


def test_a_floor_takes_the_most_alike_windows():
    features = smooth(2, 12, 12, prefix=1)
    windows = torch.arange(144).view(4, 3, 4, 3).transpose(1, 2).reshape(16, 9) + 1
    ranking = window_similarity(features, windows).argsort(dim=1, descending=True)
    for at_least in (0, 17, 50, 57, 64, 144, 145, 999):
        merged = window_merging(features, (12, 12), threshold=-1, at_least=at_least, prefix=1)
        merges = max(min(16, (145 - at_least) // 8), 0)
        assert merged.valid.sum(1).tolist() == [145 - 8 * merges] * 2
        for image in range(2):
            gone = (merged.sources[image] != torch.arange(145))[windows].any(1)
            assert set(gone.nonzero()[:, 0].tolist()) == set(ranking[image, :merges].tolist())
    floors = torch.tensor([145, 17])
    each = window_merging(features, (12, 12), threshold=-1, at_least=floors, prefix=1)
    assert each.valid.sum(1).tolist() == [145, 17]


def test_a_grid_smaller_than_a_window_and_uniform_or_empty_tokens():
    features = smooth(1, 2, 2)
    assert torch.equal(window_merging(features, (2, 2)).features, features)
    uniform = torch.ones(1, 36, 4, dtype=torch.float16) * 60_000
    merged = window_merging(uniform, (6, 6))
    assert merged.places.tolist() == [[7, 10, 25, 28]] and merged.features.isfinite().all()
    assert merged.features.dtype == torch.float16
    assert window_merging(torch.zeros(1, 36, 4), (6, 6)).valid.sum() == 36


def test_a_wrong_grid_or_window_is_refused():
    with pytest.raises(ValueError, match="3 x 3 behind 0"):
        window_merging(torch.zeros(1, 10, 4), (3, 3))
    with pytest.raises(ValueError, match="1 x 1"):
        window_merging(torch.zeros(1, 9, 4), (3, 3), (1, 1))
