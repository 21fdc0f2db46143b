# SPDX-License-Identifier: Apache-2.0
"""Not in the conformance matrix: pivots and the tokens that they choose, and the published count."""

import pytest
import torch
from conformance import models
from conformance.models import IMAGE_TOKEN, prompts
from torch.nn.functional import cosine_similarity

import vtprune
from vtprune import DART
from vtprune.tokens import ModelShape
from vtprune.transformers_private import CACHE

SHAPE = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)


@torch.no_grad()
def expected(model, inputs, layer, k, image_pivots, text_pivots):
    """Columns that stay, computed from the states and the cache of a run without pruning."""
    run = model(**inputs, use_cache=True, output_hidden_states=True)
    states = model.model.language_model.norm(run.hidden_states[layer])[0]
    norms = run[CACHE].layers[layer - 1].keys.abs().sum((1, 3))[0]
    visual = (inputs["input_ids"][0] == IMAGE_TOKEN).nonzero()[:, 0].tolist()
    text = range(visual[-1] + 1, len(states))
    by_norm = [sorted(columns, key=lambda column: -norms[column]) for columns in (visual, text)]
    kept = by_norm[0][: min(image_pivots, k)]
    pivots = [*kept, *by_norm[1][:text_pivots]]
    rest = k - len(kept)
    for number, pivot in enumerate(pivots):
        left = [column for column in visual if column not in kept]
        cosine = cosine_similarity(states, states[pivot][None], dim=-1)
        share = rest // len(pivots) + (number < rest % len(pivots))
        kept = [*kept, *sorted(left, key=lambda column: cosine[column])[:share]]
    return sorted(kept)


@pytest.mark.parametrize("name", ["mha", "gqa", "siglip"])
@pytest.mark.parametrize(("layout", "count"), [("tItttttt", 11), ("ttIttItt", 13), ("tttI", 7), ("tIttttt", 2)])
def test_each_pivot_keeps_what_is_least_like_it(name, layout, count):
    """Two images; two or no tokens of text after the image; fewer tokens than pivots."""
    model = models.shared(name)
    inputs = prompts(model, layout).inputs()
    entering = int((inputs["input_ids"] == IMAGE_TOKEN).sum())
    method = DART(layer=2, share=count / entering, image_pivots=3, text_pivots=4)
    with vtprune.prune(model, method) as session, torch.no_grad():
        model(**inputs)
    assert session.report.kept(0, 2).tolist() == expected(model, inputs, 2, count, 3, 4)
    assert session.report.kept(0, 1).tolist() == session.report.visual[0].tolist()


def test_the_published_count_stays():
    counts = DART().budgets(SHAPE, torch.tensor([576, 100, 0]), torch.tensor([1, 1, 0]))
    assert DART().cuts(SHAPE) == (2,) and counts.tolist() == [[128, 22, 0]]
    count = int(DART(keep_ratio=0.25).budgets(SHAPE, torch.tensor([576]), torch.tensor([1])))
    assert 2 * 576 + 30 * count == pytest.approx(0.25 * 576 * 32, abs=15)


def test_at_least_one_visual_pivot():
    with pytest.raises(vtprune.ConfigError, match="image_pivots"):
        DART(image_pivots=0)
