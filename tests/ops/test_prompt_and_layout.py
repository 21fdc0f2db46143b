# SPDX-License-Identifier: Apache-2.0
"""Words of a prompt, padding of an image, reading order of tiles, attention of CLS."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtprune.ops.cls_attention import cls_score
from vtprune.ops.keywords import keywords


@pytest.mark.parametrize(
    "text, expected",
    [
        ("What is the color of the small cat?", "color of small cat"),
        ("Is it?", "Is it?"),
        ("How many dogs\nAnswer the question using a single word or phrase.", "many dogs"),
        ("", ""),
    ],
)
def test_keywords(text, expected):
    assert keywords(text) == expected


@given(st.text())
def test_keywords_are_words_of_the_text_and_filtering_twice_changes_nothing(text):
    found = keywords(text)
    assert keywords(found) == found
    assert all(word in text for word in found.split())


def test_cls_score_sums_layers_and_averages_heads():
    rows = torch.rand(2, 3, 4, 10, generator=torch.Generator().manual_seed(0))
    expected = sum(rows[:, layer].sum(1) / 4 for layer in range(3))
    torch.testing.assert_close(cls_score(rows), expected)
    assert cls_score(rows.bfloat16()).dtype == torch.float32
