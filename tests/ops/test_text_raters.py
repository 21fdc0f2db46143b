# SPDX-License-Identifier: Apache-2.0
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.ops.text_raters import text_raters


@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 6))
@settings(max_examples=80, deadline=None)
def test_raters_get_more_votes_than_the_mean(seed, tokens, words):
    """A batch with padding of visual and text tokens gives the same as each group alone."""
    generator = torch.Generator().manual_seed(seed)
    visual, text = torch.randn(3, tokens, 4, generator=generator), torch.randn(3, words, 4, generator=generator)
    visual_valid = torch.rand(3, tokens, generator=generator) < 0.7
    text_valid = torch.rand(3, words, generator=generator) < 0.7
    visual_valid[:, 0] = text_valid[:, 0] = True
    raters = text_raters(visual, text, visual_valid, text_valid)
    assert not raters[~text_valid].any() and raters.any(1).all()
    for g in range(3):
        own, words_of_it = visual[g][visual_valid[g]].double(), text[g][text_valid[g]].double()
        votes = (own @ words_of_it.T).softmax(-1).mean(0)
        above = votes - votes.mean()
        if len(above) == 1:
            assert raters[g][text_valid[g]].all()
            continue
        clear = above.abs() > 1e-6
        assert raters[g][text_valid[g]][clear].tolist() == (above > 0)[clear].tolist()


def test_equal_words_all_rate_and_so_does_a_single_one():
    visual, valid = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0)), torch.ones(1, 5, dtype=torch.bool)
    word = torch.ones(1, 4, 4)
    assert text_raters(visual, word, valid, torch.ones(1, 4, dtype=torch.bool)).all()
    assert text_raters(visual, word[:, :1], valid, torch.ones(1, 1, dtype=torch.bool)).all()
    padding = torch.tensor([[False, True, False, False]])
    assert torch.equal(text_raters(visual, word, valid, padding), padding)
    assert not text_raters(visual, word, valid, torch.zeros_like(padding)).any()
