# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vtprune.ops.similarity import similarity_to


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("metric", ["cosine", "l1", "l2"])
def test_the_token_itself_is_most_alike_and_batches_are_singles(metric):
    features = draw(3, 20, 8)
    query = features[torch.arange(3), torch.tensor([4, 0, 19])]
    scores = similarity_to(query, features, metric)
    assert scores.argmax(1).tolist() == [4, 0, 19]
    torch.testing.assert_close(scores[1], similarity_to(query[1], features[1], metric))


def test_values():
    query, features = torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.0, 0.0]])
    assert similarity_to(query, features).tolist() == [1, 0, -1, 0]
    assert similarity_to(query, features, "l1").tolist() == [-0.5, -2, -1, -0.5]
    assert similarity_to(query, features, "l2").tolist() == [-0.5, -5, -2, -0.5]


def test_low_precision_is_computed_in_float32():
    features = (draw(5, 64) * 300).half()
    scores = similarity_to(features[0], features)
    assert scores.dtype == torch.float32 and scores.isfinite().all()
