# SPDX-License-Identifier: Apache-2.0
"""The words of a question that say what to look for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
