# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune.ops.token_transition import token_transition


def pair(batch=3, tokens=9, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, dim, generator=generator), torch.randn(batch, tokens, dim, generator=generator)


def test_is_the_formula_of_the_paper():
    x, y = pair(batch=1)
    direction = (1 - torch.cosine_similarity(x, y, dim=-1)).exp()
    expected = y.norm(dim=-1) / x.norm(dim=-1) * direction / direction.sum()
    torch.testing.assert_close(token_transition(x, y), expected)


def test_padding_changes_nothing_for_the_others_and_scores_zero():
    x, y = pair()
    padded_x, padded_y = torch.cat((x, torch.zeros(3, 4, 16)), 1), torch.cat((y, torch.randn(3, 4, 16)), 1)
    valid = torch.arange(13).expand(3, 13) < 9
    scores = token_transition(padded_x, padded_y, valid)
    torch.testing.assert_close(scores[:, :9], token_transition(x, y))
    assert not scores[:, 9:].any()


def test_a_sample_scores_the_same_in_any_batch_unless_the_quirk_is_asked_for():
    x, y = pair()
    alone = torch.cat([token_transition(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(token_transition(x, y), alone)
    assert not torch.allclose(token_transition(x, y, reference_quirks=True), alone, rtol=0.1)


def test_follows_the_tokens_when_they_are_permuted():
    x, y = pair()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(token_transition(x[:, order], y[:, order]), token_transition(x, y)[:, order])


def test_scaling_the_output_scales_the_score():
    x, y = pair()
    torch.testing.assert_close(token_transition(x, 3 * y), 3 * token_transition(x, y))


def test_low_precision_is_computed_in_float32():
    x, y = (t.bfloat16() for t in pair())
    scores = token_transition(x, y)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, token_transition(x.float(), y.float()))


def test_zero_tokens_stay_finite():
    x, y = pair()
    x[:, 0], y[:, 1] = 0, 0
    assert token_transition(x, y).isfinite().all()
