# SPDX-License-Identifier: Apache-2.0
"""Not in the conformance matrix: which tokens the attention and features of a model pick."""

import pytest
import torch

import vtprune
from vtprune.errors import ConfigError
from vtprune.testing import families


def chosen(scores, features, important, wanted):
    """The algorithm for one image: the best by score, then the two halves of a list are compared."""
    order = scores.argsort(descending=True).tolist()
    rest = order[important:]
    directions = torch.nn.functional.normalize(features, dim=-1)
    while len(rest) > wanted:
        even, odd = rest[0::2], rest[1::2]
        nearest = (directions[even] @ directions[odd].T).amax(1)
        ranked = [even[i] for i in nearest.argsort(descending=True).tolist()]
        rest = ranked[min(8, len(rest) - wanted, len(odd)) :] + odd
    return sorted(order[:important] + rest)


@torch.no_grad()
@pytest.mark.parametrize(("ratio", "important"), [(0.5, 5), (0.0, 0), (0.75, 7)])
def test_cls_attention_and_features_of_the_layer_that_is_read(ratio, important):
    model = families.build("llava", "eager")
    inputs = families.batch("llava", model).singles[0]
    output = model.model.vision_tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    layer = model.config.vision_feature_layer
    scores, features = output.attentions[layer][0, :, 0, 1:].mean(0), output.hidden_states[layer][0, 1:]
    with vtprune.prune(model, "vispruner", keep_tokens=10, important_ratio=ratio) as session:
        model(**inputs)
    first = (inputs["input_ids"][0] == families.IMAGE).nonzero()[0, 0]
    kept = (session.report.kept(0, 0) - first).tolist()
    assert kept == chosen(scores, features, important, 10 - important)


@torch.no_grad()
def test_without_a_cls_token_the_attention_received_in_the_last_layer_counts():
    model = families.build("paligemma", "eager")
    inputs = families.batch("paligemma", model).singles[0]
    output = model.model.vision_tower(inputs["pixel_values"], output_attentions=True)
    scores = output.attentions[-1][0].mean((0, 1))
    with vtprune.prune(model, "vispruner", keep_tokens=6) as session:
        model(**inputs)
    first = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0, 0]
    kept = (session.report.kept(0, 0) - first).tolist()
    assert kept == chosen(scores, output.last_hidden_state[0], 3, 3)


def test_a_ratio_is_a_share():
    for ratio in (-0.1, 1.5):
        with pytest.raises(ConfigError, match="important_ratio"):
            vtprune.VisPruner(keep_tokens=4, important_ratio=ratio)
