# SPDX-License-Identifier: Apache-2.0
"""Tokens chosen by hand: the same answer as from a method that chooses them, and nothing for another prompt."""

import pytest
import torch

import vtprune
from vtprune.demo.exactly import Exactly
from vtprune.eval.digitscenes import example, video_example
from vtprune.eval.inputs import chat_inputs, load_model

QUESTION = "How many digits are there?"


@pytest.fixture(scope="module")
def images():
    model, processor = load_model("digitscenes")
    return model, chat_inputs(processor, [example(3).image], [QUESTION])


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    model, processor = load_model("digitscenes_video")
    path = video_example(3).video_path(tmp_path_factory.mktemp("clips"))
    return model, chat_inputs(processor, [path], [QUESTION], "video")


@torch.no_grad()
def logits_and_kept(model, inputs, method, **options):
    with vtprune.prune(model, method, strict=False, **options) as session:
        logits = model(**inputs).logits[:, -1]
        report = session.report
    return logits, torch.searchsorted(report.visual[0], report.kept(0)).tolist()


def test_the_tokens_of_a_method_give_what_the_method_gives(images):
    model, inputs = images
    logits, kept = logits_and_kept(model, inputs, "divprune", keep_ratio=0.25)
    by_hand, same = logits_and_kept(model, inputs, Exactly(tokens=tuple(kept), of=144))
    assert same == kept and len(kept) == 36
    torch.testing.assert_close(by_hand, logits)
    other = logits_and_kept(model, inputs, Exactly(tokens=tuple(kept[1:]), of=144))[0]
    assert not torch.allclose(other, logits)


def test_the_frames_of_a_clip_are_counted_through(clips):
    model, inputs = clips
    logits, kept = logits_and_kept(model, inputs, "divprune", keep_ratio=0.25)
    assert max(kept) == 192  # the newline behind all frames is no content
    by_hand, same = logits_and_kept(model, inputs, Exactly(tokens=tuple(kept[:-1]), of=192))
    assert same == kept
    torch.testing.assert_close(by_hand, logits)


@pytest.mark.parametrize("count", [0, 144])
def test_none_and_all_may_be_chosen(images, count):
    model, inputs = images
    assert logits_and_kept(model, inputs, Exactly(tokens=tuple(range(count)), of=144))[1] == [*range(count)]


def test_a_choice_belongs_to_one_number_of_tokens(images):
    model, inputs = images
    with pytest.raises(vtprune.VTPruneError, match="among 100 visual tokens, and here are 144"):
        logits_and_kept(model, inputs, Exactly(tokens=(1, 2), of=100))


def test_what_is_no_choice_is_refused():
    with pytest.raises(vtprune.ConfigError, match="token 5 of 5"):
        Exactly(tokens=(5,), of=5)
    with pytest.raises(vtprune.ConfigError, match="tokens"):
        Exactly(tokens=(-1,), of=5)
    with pytest.raises(vtprune.BudgetError, match="no other one"):
        Exactly(tokens=(1,), of=5, keep_ratio=0.5)
