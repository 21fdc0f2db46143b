# SPDX-License-Identifier: Apache-2.0
"""Words of a prompt, padding of an image, reading order of tiles, attention of CLS."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.ops.cls_attention import cls_score
from vtprune.ops.keywords import keywords, question_from_messages
from vtprune.ops.mosaic import mosaic_order
from vtprune.ops.padding import padding_patches


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


def test_question_of_a_chat():
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<image>what is"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "and this?"},
    ]
    assert question_from_messages(chat) == "what is and this?"
    assert question_from_messages(chat[:1]) is None
    assert question_from_messages([{"role": "user", "content": [{"type": "text", "text": ""}]}]) is None


@given(st.integers(1, 2000), st.integers(1, 2000), st.booleans())
@settings(deadline=None)
def test_padding_lies_in_the_border_symmetrically(width, height, overlap):
    patches = set(padding_patches(width, height, overlap=overlap))
    transposed = {patch % 24 * 24 + patch // 24 for patch in padding_patches(height, width, overlap=overlap)}
    assert patches == transposed
    content = round(min(width, height) * (336 / max(width, height)))
    before = (336 - content) // 2
    for patch in range(24 * 24):
        line = patch // 24 if width > height else patch % 24
        inside = [before <= pixel < before + content for pixel in range(line * 14, line * 14 + 14)]
        assert (patch in patches) == (not all(inside) if overlap else not any(inside))


def test_a_mosaic_is_read_row_by_row_through_all_its_tiles():
    side, across, down = 3, 2, 2
    crops = torch.arange(1 + across * down).repeat_interleave(side * side)
    patches = torch.arange(side * side).repeat(1 + across * down)
    order = mosaic_order(crops, patches, tiles_across=across, side=side)
    assert order[:9].tolist() == list(range(9))
    picture = torch.arange(9, 45).view(down, across, side, side).transpose(1, 2).reshape(-1)
    assert order[9:].tolist() == picture.tolist()


def test_cls_score_sums_layers_and_averages_heads():
    rows = torch.rand(2, 3, 4, 10, generator=torch.Generator().manual_seed(0))
    expected = sum(rows[:, layer].sum(1) / 4 for layer in range(3))
    torch.testing.assert_close(cls_score(rows), expected)
    assert cls_score(rows.bfloat16()).dtype == torch.float32
