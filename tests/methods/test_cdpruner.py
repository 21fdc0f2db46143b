# SPDX-License-Identifier: Apache-2.0
"""Not in the conformance matrix: the source of relevance. With a text tower: tests/stages/test_text_tower.py."""

import pytest
import torch

import vtprune
from vtprune.ops.determinantal import conditional_diversity, mean_similarity, scaled_relevance
from vtprune.signals import EncoderOutput, JointSpace, TextEmbeddings
from vtprune.testing import families
from vtprune.tokens import ModelShape, VisualTokens

SHAPE = ModelShape(encoder_layers=4, decoder_layers=8, feature_layer=2, has_cls=True)


def greedy(features, relevance, k):
    """The choice by determinants, for one image."""
    directions = torch.nn.functional.normalize(features.double(), dim=-1)
    kernel = relevance[:, None] * (directions @ directions.T) * relevance
    chosen = []
    for _ in range(k):
        left = [i for i in range(len(features)) if i not in chosen]
        chosen.append(max(left, key=lambda i: torch.logdet(kernel[chosen + [i]][:, chosen + [i]]).item()))
    return sorted(chosen)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_without_a_text_tower_likeness_to_the_question_in_the_llms_space_counts(name):
    model = families.shared(name)
    inputs = families.batch(name, model).singles[0]
    question = torch.tensor([5, 9, 7])
    with vtprune.prune(model, "cdpruner", keep_tokens=6, text=question) as session:
        model(**inputs)
        report = session.report
    features = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    texts = model.get_input_embeddings()(question)
    scores = torch.cosine_similarity(features[:, None], texts[None], dim=-1).mean(1)
    relevance = (scores - scores.min() + 1e-6) / (scores.max() - scores.min())
    first = int(report.visual[0][0])
    assert (report.kept(0, 0) - first).tolist() == greedy(features, relevance, 6)


def two_crops(request_signals):
    generator = torch.Generator().manual_seed(0)
    valid = torch.arange(12) < torch.tensor([[12], [9]])
    features = torch.randn(2, 12, 16, generator=generator) * valid[..., None]
    return VisualTokens(
        features=features, valid=valid, budget=torch.tensor([5, 4]), signals=request_signals, shape=SHAPE
    )


def test_in_clips_space_the_least_alike_tokens_are_the_relevant_ones():
    generator = torch.Generator().manual_seed(1)
    method = vtprune.CDPruner(text_tower="clip", keep_tokens=5)
    output, space = method.signals(SHAPE)
    assert (output, space) == (EncoderOutput(2, normalised=True), JointSpace("clip"))
    outputs, questions = torch.randn(2, 12, 6, generator=generator), torch.randn(2, 4, generator=generator)
    projection = torch.randn(4, 6, generator=generator)
    tokens = two_crops({output: outputs, space: (questions, projection)})
    scores = -torch.cosine_similarity(outputs @ projection.T, questions[:, None], dim=-1)
    for quirks in (False, True):
        relevance = scaled_relevance(scores, tokens.valid, together=quirks)
        expected = conditional_diversity(tokens.features, relevance, tokens.valid, tokens.budget)
        method = vtprune.CDPruner(text_tower="clip", keep_tokens=5, reference_quirks=quirks)
        assert torch.equal(method.select(tokens).keep, expected)
    alike = conditional_diversity(tokens.features, scaled_relevance(-scores, tokens.valid), tokens.valid, tokens.budget)
    assert not torch.equal(alike, expected)


def test_without_any_text_diversity_decides():
    tokens = two_crops({TextEmbeddings(): [torch.empty(0, 16)] * 2})
    keep = vtprune.CDPruner(keep_tokens=5).select(tokens).keep
    expected = conditional_diversity(tokens.features, torch.ones(2, 12), tokens.valid, tokens.budget)
    assert torch.equal(keep, expected)


def test_the_question_decides_what_is_kept():
    generator = torch.Generator().manual_seed(2)
    kept = set()
    for _ in range(3):
        tokens = two_crops({TextEmbeddings(): [torch.randn(2, 16, generator=generator) for _ in range(2)]})
        scores = mean_similarity(tokens.features, tokens[TextEmbeddings()])
        keep = vtprune.CDPruner(keep_tokens=5).select(tokens).keep
        best = scores.masked_fill(~tokens.valid, -1).argmax(1)
        assert keep[torch.arange(2), best].all(), "the most relevant token comes first"
        kept.add(tuple(keep.flatten().tolist()))
    assert len(kept) == 3
