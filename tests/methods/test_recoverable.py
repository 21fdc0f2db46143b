# SPDX-License-Identifier: Apache-2.0
"""Not in the conformance matrix: gathering the rest, counts by outliers, the scores of a model."""

import pytest
import torch

import vtprune
from vtprune.ops.outliers import outlier_share
from vtprune.ops.recoverable_compression import counts_within, recover, text_scores
from vtprune.signals import EncoderKeys, EncoderSaliency, TextEmbeddings
from vtprune.testing import families
from vtprune.tokens import ModelShape, Selection, VisualTokens

SHAPE = ModelShape(encoder_layers=4, decoder_layers=8, feature_layer=2, has_cls=True)
REQUESTS = (EncoderSaliency(3), EncoderKeys(3), TextEmbeddings())
LENGTHS = (48, 60)


def two_images(k: int) -> VisualTokens:
    """Groups of 48 and 60 tokens; a few tokens have outlying attention."""
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(2, 4, 60, generator=generator).mean(1).div_(60)
    attention[..., 5:9] += torch.tensor([0.2, 0.31, 0.44, 0.6])
    signals = {
        REQUESTS[0]: attention,
        REQUESTS[1]: torch.randn(2, 60, 6, generator=generator),
        REQUESTS[2]: [torch.randn(n, 8, generator=generator) for n in (3, 5)],
    }
    valid = torch.arange(60) < torch.tensor(LENGTHS)[:, None]
    features = torch.randn(2, 60, 8, generator=generator) * valid[..., None]
    return VisualTokens(features=features, valid=valid, budget=torch.full((2,), k), signals=signals, shape=SHAPE)


@pytest.mark.parametrize("k", [-1, 0, 1, 7, 20, 48])
def test_each_image_is_recovered_as_by_the_operation(k):
    tokens = two_images(k)
    attention, keys, texts = (tokens[request] for request in REQUESTS)
    selection = vtprune.Recoverable().select(tokens)
    for group, length in enumerate(LENGTHS):
        values = tokens.features[group, :length]
        text = text_scores(texts[group].mean(0), values)
        visual = attention[group, :length]
        counts = counts_within(visual, text, 6, None if k < 0 else k).tolist()
        expected = recover(values, keys[group, :length], visual, text, counts)
        assert expected.places.shape[1] == (k if k >= 0 else int(selection.keep[group].sum()))
        for part, other in zip(
            (selection.keep, selection.features, selection.sources), expected.in_place(values[None]), strict=True
        ):
            torch.testing.assert_close(part[group, :length], other[0])
        assert not selection.keep[group, length:].any()


def test_the_reference_counts_centres_by_width_and_compares_the_first_keys():
    tokens = two_images(-1)
    attention, keys, texts = (tokens[request] for request in REQUESTS)
    selection = vtprune.Recoverable(reference_quirks=True).select(tokens)
    sane = vtprune.Recoverable().select(tokens)
    for group, length in enumerate(LENGTHS):
        values = tokens.features[group, :length]
        scores = attention[group, :length], text_scores(texts[group].mean(0), values)
        counts = counts_within(*scores, 6, None, reference_quirks=True).tolist()
        merged = recover(values, keys[group, :length], *scores, counts, reference_quirks=True)
        expected = merged.in_place(values[None])
        for part, other in zip((selection.keep, selection.features, selection.sources), expected, strict=True):
            torch.testing.assert_close(part[group, :length], other[0])
    assert not torch.equal(selection.features, sane.features)


def test_the_rest_can_be_dropped():
    tokens = two_images(-1)
    selection = vtprune.Recoverable(gather=False).select(tokens)
    assert selection.features is None and selection.sources is None
    visual = tokens[REQUESTS[0]][1]
    by_vision = int(60 * outlier_share(visual, 20) + 1e-9)
    assert by_vision >= 4 and selection.keep[1, 5:9].all()
    assert by_vision <= int(selection.keep[1].sum()) < 60
    for k in (0, 1, 9, 48):
        assert vtprune.Recoverable(gather=False).select(two_images(k)).keep.sum(1).tolist() == [k, k]


def test_the_encoder_layer_can_be_chosen():
    assert vtprune.Recoverable().signals(SHAPE) == REQUESTS
    assert vtprune.Recoverable(layer=1).signals(SHAPE)[:2] == (EncoderSaliency(1), EncoderKeys(1))
    with pytest.raises(vtprune.ConfigError, match=r"layer=4 must be within 0\.\.3"):
        vtprune.Recoverable(layer=4).signals(SHAPE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_a_model_without_a_budget_keeps_what_stands_out(name):
    model = families.shared(name)
    batch = families.batch(name, model)
    chosen: list[Selection] = []

    class Spy(vtprune.Recoverable):
        name = "spy"

        def select(self, tokens):
            assert bool((tokens.budget == -1).all())
            chosen.append(super().select(tokens))
            return chosen[-1]

    with vtprune.prune(model, Spy(outlier_factor=1.1)) as session:
        model(**batch.inputs)
    report = session.report
    kept = int(chosen[0].keep.sum())
    assert 0 < kept < sum(report.original_tokens)
    assert int(report.counts[:, 0].sum()) == kept
