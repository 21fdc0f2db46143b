# SPDX-License-Identifier: Apache-2.0
"""What of a prompt stands for it where images are encoded."""

from __future__ import annotations

import vtprune
from vtprune.serving.signals import prompt_key, questions
from vtprune.testing import families
from vtprune.testing.media import BOS, END, IMAGE, START, VIDEO


def test_a_question_is_what_follows_its_image():
    adapter = vtprune.adapter_for(families.shared("qwen2_5_vl"))
    ids = [BOS, 5, START, IMAGE, END, 6, 7, START, IMAGE, END, START, VIDEO, END, 8]
    assert questions(ids, "image", 2, adapter) == [[6, 7, 8], [8]]
    assert questions(ids, "video", 1, adapter) == [[8]]


def test_a_word_beside_an_image_is_part_of_its_question():
    """InternVL's processor puts a marker there, and vLLM, too, but later."""
    adapter = vtprune.adapter_for(families.shared("internvl"))
    assert questions([BOS, 5, IMAGE, 6, 7], "image", 1, adapter) == [[6, 7]]


def test_without_text_behind_an_image_all_text_is_its_question():
    adapter = vtprune.adapter_for(families.shared("llava"))
    assert questions([BOS, 5, 6, IMAGE], "image", 1, adapter) == [[5, 6]]


def test_a_prompts_number_depends_on_its_text_alone():
    adapter = vtprune.adapter_for(families.shared("llava"))
    one, other = [BOS, IMAGE, 5], [BOS, IMAGE, IMAGE, 5]
    assert prompt_key(one, adapter) == prompt_key(other, adapter) != prompt_key([BOS, IMAGE, 6], adapter)
