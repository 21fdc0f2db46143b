# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.ops.reservoir import Reservoir, entropy, nearest_anchor

OPTIONS = dict(scale=0.5, beta=3.0, strength=2.0)


def stream(length, classes, seed=0, layers=3, dim=5):
    generator = torch.Generator().manual_seed(seed)
    cls = torch.randn(length, layers, dim, generator=generator)
    entropies = torch.rand(length, generator=generator) * 2
    return cls, entropies, torch.randint(classes, (length,), generator=generator)


class Lists:
    """The reservoir with one list a class, of numbers of samples."""

    def __init__(self, classes, size, cls, entropies):
        self.content, self.size = [[] for _ in range(classes)], size
        self.cls, self.entropies = cls.double(), entropies.double()

    def insert(self, sample, label):
        kept = [*self.content[label], sample]
        if len(kept) > self.size:
            typical = {item: self.cls[item].mean(0) for item in kept}

            def redundancy(item):
                others = [torch.cosine_similarity(typical[item], typical[o], dim=0) for o in kept if o != item]
                return self.entropies[item] + (sum(others) / len(others) if others else 0)

            kept.remove(max(kept, key=redundancy))
        self.content[label] = sorted(kept, key=lambda item: self.entropies[item])

    def correction(self, sample, scale, beta, strength):
        depths = torch.linspace(0, 1, self.cls.shape[1]).double()
        weights = torch.exp(depths / scale) / torch.exp(depths / scale).sum()
        own = self.cls[sample]
        return torch.stack(
            [
                sum(
                    (
                        strength
                        * torch.exp(-beta * (1 - weights @ torch.cosine_similarity(self.cls[item], own, dim=-1)))
                        for item in kept
                    ),
                    torch.zeros(()).double(),
                )
                for kept in self.content
            ]
        )

    def anchors(self):
        if min(map(len, self.content)) < 2:
            return None
        return torch.stack([self.cls[kept].mean(0) for kept in self.content])


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 4), st.integers(1, 25))
@settings(max_examples=40, deadline=None)
def test_is_the_algorithm_sample_by_sample(seed, classes, size, length):
    cls, entropies, labels = stream(length, classes, seed)
    reservoir, lists = Reservoir(classes, size, *cls.shape[1:]), Lists(classes, size, cls, entropies)
    for sample in range(length):
        one = slice(sample, sample + 1)
        correction = reservoir.observe(cls[one], entropies[one], labels[one], **OPTIONS)
        lists.insert(sample, int(labels[sample]))
        torch.testing.assert_close(correction[0].double(), lists.correction(sample, **OPTIONS), rtol=1e-5, atol=1e-6)
    for label, kept in enumerate(lists.content):
        assert torch.equal(reservoir.cls[label, : len(kept)], cls[kept])
        assert torch.equal(reservoir.entropies[label, : len(kept)], entropies[kept])
        assert reservoir.entropies[label, len(kept) :].isinf().all()
    anchors, expected = reservoir.anchors(), lists.anchors()
    assert (anchors is None) == (expected is None)
    if anchors is not None:
        torch.testing.assert_close(anchors, expected.float())


@pytest.mark.parametrize("parts", [[12], [5, 7], [1, 4, 4, 3]])
def test_a_batch_is_its_samples_in_order(parts):
    cls, entropies, labels = stream(12, 3)
    single, batched = (Reservoir(3, 2, *cls.shape[1:]) for _ in range(2))
    one_by_one = [single.observe(*(x[i : i + 1] for x in (cls, entropies, labels)), **OPTIONS) for i in range(12)]
    pieces = zip(*(x.split(parts) for x in (cls, entropies, labels)), strict=True)
    together = [batched.observe(*piece, **OPTIONS) for piece in pieces]
    assert torch.equal(torch.cat(together), torch.cat(one_by_one))
    assert torch.equal(single.cls, batched.cls) and torch.equal(single.entropies, batched.entropies)


def test_a_sample_that_is_nan_is_not_kept():
    cls, entropies, labels = stream(6, 1)
    clean, reservoir = (Reservoir(1, 2, *cls.shape[1:]) for _ in range(2))
    for sample in range(6):
        one = slice(sample, sample + 1)
        reservoir.observe(cls[one] * torch.nan, entropies[one] * torch.nan, labels[one], **OPTIONS)
        clean.observe(cls[one], entropies[one], labels[one], **OPTIONS)
        reservoir.observe(cls[one], entropies[one], labels[one], **OPTIONS)
    assert torch.equal(reservoir.cls, clean.cls) and torch.equal(reservoir.entropies, clean.entropies)


def test_low_precision_is_kept_in_float32():
    cls, entropies, labels = stream(4, 2)
    reservoir = Reservoir(2, 2, *cls.shape[1:])
    correction = reservoir.observe(cls.bfloat16(), entropies.bfloat16(), labels, **OPTIONS)
    assert correction.dtype == torch.float32 and reservoir.cls.dtype == torch.float32


def test_samples_can_be_inserted_in_any_mode_wherever_they_were_made_or_moved():
    with torch.inference_mode():
        reservoir = Reservoir(2, 2, 3, 5)
        made = reservoir.cls, reservoir.entropies
        reservoir.to("meta")
    moved = reservoir.cls, reservoir.entropies
    assert {x.device.type for x in moved} == {"meta"} and not any(x.is_inference() for x in (*made, *moved))


def test_entropy():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [200.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(entropy(logits), torch.tensor([4.0, 1.0]).log())
    probabilities = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    expected = torch.distributions.Categorical(probabilities).entropy()
    torch.testing.assert_close(entropy(probabilities.log()), expected)


def test_the_nearest_anchor_has_the_largest_cosine():
    anchors = torch.tensor([[1.0, 0.0], [0.0, 5.0], [2.0, 2.0]])
    cls = torch.tensor([[3.0, 0.1], [1.0, 0.9], [0.1, 0.9]]).bfloat16()
    nearest = nearest_anchor(anchors, cls)
    assert nearest.tolist() == [[1, 0], [2, 2], [0, 5]] and nearest.dtype == torch.bfloat16
