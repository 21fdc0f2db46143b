# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import vtprune
from vtprune.errors import UnsupportedStageError
from vtprune.signals import SampleKeys
from vtprune.stages.before_llm import prune_before_llm
from vtprune.tokens import Grid, Medium, Selection

from .hand_made import Scripted, ScriptedBefore, call_of, encoding, numbered, row_of, with_newlines

CROPPED = Medium.of_grids(Grid(1, 1), Grid(1, 2))
"""Two crops, of one token and of two."""


def call():
    """An image of two crops in columns 1 to 3; two images in columns 0 and 1, and 3 and 4."""
    return call_of("tiiit.", "iitiit", encodings=[encoding(CROPPED, row_of(2), row_of(2))])


def choose(method, tokens) -> Selection:
    return method.choose(tokens)


def recorder(cuts=(), compact=False, into=None, original=None, keys=()) -> SimpleNamespace:
    """What was merged inside the encoder: see `EncoderRecorder.copied_into`."""
    return SimpleNamespace(
        merges=bool(cuts),
        compact=compact,
        copied_into=lambda encodings: (torch.tensor(into), torch.tensor(original)),
        image_keys=lambda encoding: keys,
    )


def prune(prompts, *methods, record=None, text=None) -> torch.Tensor:
    hidden = numbered(prompts.batch, prompts.length)
    return prune_before_llm(prompts, hidden, list(methods), record or recorder(), text, choose)


def columns(prompts) -> list[list[int]]:
    """The columns left of each sample."""
    pairs = zip(prompts.sequence.columns, prompts.sequence.real, strict=True)
    return [row[real].tolist() for row, real in pairs]


def test_a_method_is_shown_the_crops():
    method = ScriptedBefore(keeps=(([0], [0], [0], [1]),))
    prune(call(), method)
    (shown,) = method.seen
    assert shown.features[..., 0].tolist() == [[2, 0], [3, 4], [7, 8], [10, 11]]
    assert shown.valid.tolist() == [[True, False], [True, True], [True, True], [True, True]]
    assert shown.crops.tolist() == [[0, -1], [0, 0], [0, 0], [0, 0]]
    assert shown.grids == (Grid(1, 1), Grid(1, 2), Grid(1, 2), Grid(1, 2))
    assert shown.kinds == ("image",) * 4 and shown.runs is None and shown.layer is None


def test_a_method_of_whole_images_is_shown_their_crops_side_by_side():
    method = ScriptedBefore(keeps=(([0, 2], [0], [1]),), scope="image")
    prompts = call()
    prune(prompts, method)
    (shown,) = method.seen
    assert shown.features[..., 0].tolist() == [[2, 3, 4], [7, 8, 0], [10, 11, 0]]
    assert shown.crops.tolist() == [[0, 1, 1], [0, 0, -1], [0, 0, -1]]
    assert shown.layouts == ((Grid(1, 1), Grid(1, 2)), (Grid(1, 2),), (Grid(1, 2),))
    assert columns(prompts) == [[0, 1, 3, 4], [0, 2, 4, 5]]


def test_states_come_back_shorter():
    prompts = call()
    hidden = prune(prompts, ScriptedBefore(keeps=(([0], [0], [0], []),)))
    assert hidden[..., 0].tolist() == [[1, 2, 3, 5], [0, 7, 9, 12]]
    assert prompts.sequence.real.tolist() == [[True] * 4, [False, True, True, True]]
    assert prompts.starts == [0] and prompts.pruned


def test_later_methods_are_shown_what_earlier_ones_left():
    first = ScriptedBefore(keeps=(([0], [1], [0, 1], []),))
    second = ScriptedBefore(keeps=(([0], [], [1], []),))
    prompts = call()
    prune(prompts, first, second)
    (shown,) = second.seen
    assert shown.features[..., 0].tolist() == [[2, 0], [4, 0], [7, 8], [0, 0]]
    assert shown.grids == (Grid(1, 1), None, Grid(1, 2), None), "a crop that lost tokens has no grid"
    assert columns(prompts) == [[0, 1, 4], [1, 2, 5]]
    assert prompts.sequence.merged_into.tolist() == [[0, 1, -1, -1, 4, -1], [-1, 1, 2, -1, -1, 5]]


@dataclass(frozen=True, kw_only=True)
class Counting(Scripted, vtprune.BeforeLLM):
    name: ClassVar[str] = "counting"


def test_a_method_is_asked_only_if_its_budget_is_less_than_everything():
    generous, spare = Counting(keep_tokens=2), Counting(keep_tokens=1, keeps=(([0], [0], [0], [0]),))
    prompts = call()
    hidden = prune(prompts, generous)
    assert not generous.seen and not prompts.pruned and hidden.shape == (2, 6, 1)
    prune(prompts, spare)
    assert spare.seen[0].budget.tolist() == [1, 1, 1, 1]


def test_positions_are_the_methods_choice():
    for kept, expected in (("original", [0, 2, 3, 5]), ("compact", [0, 1, 2, 3])):
        prompts = call()
        prune(prompts, ScriptedBefore(keeps=(([0], [0], [0], [0]),), positions=kept))
        assert prompts.sequence.positions[1].tolist() == expected


def test_signals_are_read_and_kinds_are_named():
    prompts = call_of("vvti", encodings=[encoding(row_of(1)), encoding(row_of(2), kind="video")])
    method = ScriptedBefore(keeps=(([0], [0]),), requests=(SampleKeys(),))
    prune(prompts, method, record=recorder(keys=[5]))
    key = prompts.prompt_key(0)
    assert method.read == [{SampleKeys(): [key + 5, key + 5]}] and method.seen[0].kinds == ("image", "video")


def test_separators_are_shown_to_no_method_and_go_with_their_line():
    prompts = call_of("tiiiiiit", encodings=[encoding(with_newlines(2, 2))])
    method = ScriptedBefore(keeps=(([0],),))
    prune(prompts, method)
    assert method.seen[0].features[..., 0].tolist() == [[2, 3, 5, 6]]
    assert columns(prompts) == [[0, 1, 3, 7]]


# -- what was merged inside the encoder ---------------------------------------------------------------------------


def with_merges(prompts):
    """A call before which the encoder merged tokens."""
    prompts.media.encodings[0].merge = "what the recorder tells"
    return prompts


def image_of_five():
    """One image, in columns 1 to 5. Token n of the encoder stands for visual token n."""
    return with_merges(call_of("tiiiiit", encodings=[encoding(row_of(5))]))


def merged(into, original, **options):
    prompts = image_of_five()
    hidden = prune(prompts, record=recorder((1,), into=into, original=original, **options))
    return prompts, hidden


def test_of_copies_the_token_that_it_was_stays():
    """The encoder merged 0 and 2 into 1, and 4 into 3."""
    prompts, hidden = merged([1, 1, 1, 3, 3], [False, True, False, True, False])
    assert columns(prompts) == [[0, 2, 4, 6]] and hidden[..., 0].tolist() == [[1, 3, 5, 7]]
    assert prompts.sequence.merged_into.tolist() == [[0, 2, 2, 2, 4, 4, 6]]


def test_of_copies_of_what_became_no_visual_token_the_first_stays():
    prompts, _ = merged([9, 1, 9, 3, 9], [False, True, False, True, False])
    assert columns(prompts) == [[0, 1, 2, 4, 6]]
    assert prompts.sequence.merged_into.tolist() == [[0, 1, 2, 1, 4, 1, 6]]


def test_tokens_made_of_several_stay_apart_and_dropped_ones_go():
    prompts, _ = merged([-1, -1, -2, 3, -2], [False, False, False, True, False])
    assert columns(prompts) == [[0, 1, 2, 4, 6]]
    assert prompts.sequence.merged_into.tolist() == [[0, 1, 2, -1, 4, -1, 6]]


def test_copies_in_different_crops_stay_apart():
    prompts = with_merges(call())
    original = [number == 2 for number in range(7)]
    prune(prompts, record=recorder((1,), into=[2] * 7, original=original))
    assert columns(prompts) == [[0, 1, 3, 4], [0, 2, 3, 5]]


def test_merged_tokens_go_before_any_method_looks():
    prompts = image_of_five()
    method = ScriptedBefore(keeps=(([1],),))
    record = recorder((1,), into=[1, 1, 1, 3, 3], original=[False, True, False, True, False])
    prune(prompts, method, record=record)
    assert method.seen[0].features[..., 0].tolist() == [[3, 5]] and method.seen[0].grids == (None,)
    assert prompts.sequence.merged_into.tolist() == [[0, -1, -1, -1, 4, 4, 6]]


def test_positions_of_merged_tokens_are_the_encoder_methods_choice():
    for compact, expected in ((False, [0, 2, 4, 6]), (True, [0, 1, 2, 3])):
        prompts, _ = merged([1, 1, 1, 3, 3], [False, True, False, True, False], compact=compact)
        assert prompts.sequence.positions.tolist() == [expected]


def test_an_encoder_that_merged_nothing_leaves_everything():
    prompts = call()
    assert prune(prompts, record=SimpleNamespace(merges=True)).shape == (2, 6, 1)
    assert not prompts.pruned


def test_features_from_elsewhere_are_refused_where_the_encoder_merges():
    prompts = with_merges(call())
    prompts.embeddings[0, 1] += 1
    with pytest.raises(UnsupportedStageError, match="computed elsewhere"):
        prune(prompts, record=recorder((1,)))
