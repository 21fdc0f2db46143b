# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vtprune import VTPruneError
from vtprune.checks import asked_together, require, with_short_cut

YES, NO = torch.tensor(True), torch.tensor(False)


def test_a_condition_alone_is_raised_at_once():
    require(YES, "not this")
    with pytest.raises(VTPruneError, match="^this$"):
        require(NO, lambda: "this")


def test_conditions_are_read_together_and_the_first_that_fails_is_raised():
    reached = []

    def work():
        require(YES, "not this")
        require(NO[None], "first")
        require(NO, "second")
        reached.append(True)

    with pytest.raises(VTPruneError, match="^first$"):
        asked_together(work)
    assert reached
    with pytest.raises(VTPruneError, match="alone"):
        require(NO, "alone")


def test_a_failed_condition_goes_before_what_follows_from_it():
    def work(first):
        require(first, "cause")
        raise IndexError("consequence")

    with pytest.raises(VTPruneError, match="^cause$"):
        asked_together(lambda: work(NO))
    with pytest.raises(IndexError, match="consequence"):
        asked_together(lambda: work(YES))


def test_a_short_cut_that_is_not_right_is_not_taken():
    def short_cut(right):
        return with_short_cut(lambda: ("quick", right), lambda: "careful")

    assert [short_cut(YES), short_cut(NO)] == ["quick", "careful"]
    assert asked_together(lambda: short_cut(YES)) == "quick"
    assert asked_together(lambda: [short_cut(YES), short_cut(NO)]) == ["careful", "careful"]
    assert short_cut(YES) == "quick"


def test_what_is_required_after_a_wrong_short_cut_is_asked_again():
    def work():
        result = with_short_cut(lambda: (1, NO), lambda: 2)
        require(torch.tensor(result == 2), "wrong result")
        return result

    assert asked_together(work) == 2
