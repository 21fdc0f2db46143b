# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vtprune import VTPruneError
from vtprune.checks import asked_together, require

YES, NO = torch.tensor(True), torch.tensor(False)


def test_a_condition_alone_is_raised_at_once():
    require(YES, "not this")
    with pytest.raises(VTPruneError, match="^this$"):
        require(NO, lambda: "this")


def test_conditions_are_read_together_and_the_first_that_fails_is_raised():
    reached = []
    with pytest.raises(VTPruneError, match="^first$"), asked_together():
        require(YES, "not this")
        require(NO[None], "first")
        require(NO, "second")
        reached.append(True)
    assert reached
    with pytest.raises(VTPruneError, match="alone"):
        require(NO, "alone")


def test_a_failed_condition_goes_before_what_follows_from_it():
    with pytest.raises(VTPruneError, match="^cause$"), asked_together():
        require(NO, "cause")
        raise IndexError("consequence")
    with pytest.raises(IndexError, match="no consequence"), asked_together():
        require(YES, "not this")
        raise IndexError("no consequence")
