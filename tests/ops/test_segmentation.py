# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vtprune import VTPruneError
from vtprune.ops.segmentation import segment_frames, still_positions, temporal_similarity


def draw(frames, positions, share, seed=0):
    return torch.rand(frames - 1, positions, generator=torch.Generator().manual_seed(seed)) < share


def by_definition(still, max_window):
    """Dynamic programming over the table of all gains, in the order that decides between equal solutions."""
    frames = len(still) + 1
    value, start = [0] * (frames + 1), [0] * frames
    for last in range(frames):
        value[last + 1], start[last] = value[last], last
        for window in range(2, min(last + 1, max_window) + 1):
            first = last - window + 1
            gain = (last - first) * int(still[first:last].all(0).sum())
            if value[first] + gain > value[last + 1]:
                value[last + 1], start[last] = value[first] + gain, first
    segments, last = [], frames - 1
    while last >= 0:
        segments.insert(0, [start[last], last])
        last = start[last] - 1
    return segments, value[frames]


@given(st.integers(1, 25), st.integers(0, 6), st.floats(0, 1), st.integers(1, 26), st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_equals_the_definition_ties_included(frames, positions, share, window, seed):
    still = draw(frames, positions, share, seed)
    segments, saved = segment_frames(still, window)
    assert (segments.tolist(), saved) == by_definition(still, window)


@given(st.integers(1, 8), st.floats(0, 1), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_no_other_way_to_cut_saves_more(frames, share, seed):
    still = draw(frames, 3, share, seed)
    best = 0
    for cuts in itertools.product((False, True), repeat=frames - 1):
        bounds = [0, *(frame + 1 for frame, cut in enumerate(cuts) if cut), frames]
        segments = torch.tensor([[first, end - 1] for first, end in itertools.pairwise(bounds)])
        best = max(best, saving(still, segments))
    segments, saved = segment_frames(still)
    assert saved == best == saving(still, segments)


def saving(still, segments):
    return int((still_positions(still, segments).sum(1) * (segments[:, 1] - segments[:, 0])).sum())


@given(st.integers(1, 60), st.floats(0, 1), st.integers(1, 10), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_segments_follow_one_another_and_keep_to_the_window(frames, share, window, seed):
    still = draw(frames, 5, share, seed)
    segments, saved = segment_frames(still, window)
    assert segments[0, 0] == 0 and segments[-1, 1] == frames - 1
    assert (segments[1:, 0] == segments[:-1, 1] + 1).all()
    assert ((segments[:, 1] - segments[:, 0] + 1) <= window).all()
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    permuted, also_saved = segment_frames(still[:, order], window)
    assert permuted.tolist() == segments.tolist() and also_saved == saved


@pytest.mark.parametrize("frames", [1, 2, 9])
def test_all_still_is_one_segment_and_nothing_still_is_none(frames):
    everything, nothing = torch.ones(frames - 1, 4, dtype=torch.bool), torch.zeros(frames - 1, 4, dtype=torch.bool)
    assert segment_frames(everything)[0].tolist() == [[0, frames - 1]]
    assert segment_frames(everything)[1] == 4 * (frames - 1)
    singles = [[frame, frame] for frame in range(frames)]
    assert segment_frames(nothing)[0].tolist() == singles == segment_frames(everything, 1)[0].tolist()
    assert not still_positions(everything, torch.tensor(singles)).any()


def test_a_window_below_one_is_refused():
    with pytest.raises(ValueError, match="at least one frame"):
        segment_frames(draw(5, 3, 0.5), 0)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("share", [0.5, 0.99, 1.0])
def test_memory_is_linear_in_the_frames(share):
    frames, positions = 300, 4
    still = draw(frames, positions, share)
    with Largest() as largest:
        still_positions(still, segment_frames(still)[0])
    assert 0 < largest.elements <= frames * positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_similarity_is_the_cosine_in_blocks_of_any_size(dtype, monkeypatch):
    features = torch.randn(11, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.cosine_similarity(features[:-1].float(), features[1:].float(), dim=-1)
    for elements in (1, 24, 100, 1 << 20):
        monkeypatch.setattr("vtprune.ops.segmentation._BLOCK_ELEMENTS", elements)
        torch.testing.assert_close(temporal_similarity(features), expected)


def test_zero_vectors_resemble_nothing_and_nan_is_refused():
    features = torch.ones(4, 2, 5)
    features[1, 0] = 0
    assert temporal_similarity(features)[:, 0].tolist() == pytest.approx([0, 0, 1])
    assert temporal_similarity(features[:1]).shape == (0, 2)
    features[3, 1, 2] = torch.nan
    with pytest.raises(VTPruneError, match="NaN or infinite"):
        temporal_similarity(features)
