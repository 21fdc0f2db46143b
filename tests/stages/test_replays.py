# SPDX-License-Identifier: Apache-2.0
import gc

import pytest
import torch

from vtprune.stages.replays import Replays
from vtprune.tokens import Selection

PROMPT = torch.tensor([[5, 6, 7]])
LONGER = torch.tensor([[5, 6, 7, 8]])


class Output:
    """What an encoder returned."""


def choice() -> Selection:
    return Selection(torch.ones(1, 1, dtype=torch.bool))


def prefill(replays: Replays, features, ids, choices: int = 1) -> list[Selection]:
    replays.begin(features, ids)
    assert not replays.replaying
    return [replays.note(choice()) for _ in range(choices)]


def test_a_prompt_that_goes_on_is_given_the_choices_in_their_order():
    features, replays = (Output(), Output()), Replays()
    first, second = prefill(replays, features, PROMPT, choices=2)
    replays.begin(features, LONGER)
    assert replays.replaying and replays.next() is first and replays.next() is second
    replays.begin(features, torch.tensor([[5, 6, 7, 8, 9]]))
    assert replays.next() is first, "the choices are good for every further token"


def test_a_choice_is_returned_when_it_is_noted():
    made = choice()
    replays = Replays()
    replays.begin((Output(),), PROMPT)
    assert replays.note(made) is made


@pytest.mark.parametrize(
    "ids",
    [
        PROMPT,  # the same call again
        torch.tensor([[5, 6, 9, 8]]),  # begins otherwise
        torch.tensor([[5, 6]]),  # is shorter
        torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]]),  # another batch
    ],
)
def test_what_does_not_go_on_is_chosen_for_anew(ids):
    features, replays = (Output(),), Replays()
    prefill(replays, features, PROMPT)
    replays.begin(features, ids)
    assert not replays.replaying


def test_other_images_are_chosen_for_anew():
    features, replays = (Output(),), Replays()
    prefill(replays, features, PROMPT)
    other = (Output(),)
    replays.begin(other, LONGER)
    assert not replays.replaying
    replays.begin((*features, *other), LONGER)
    assert not replays.replaying


def test_a_call_that_repeats_none_is_not_remembered():
    features, replays = (Output(),), Replays()
    replays.begin(features, None)
    replays.note(choice())
    replays.begin(features, LONGER)
    assert not replays.replaying


def test_of_two_prompts_that_a_call_begins_with_the_longer_one_counts():
    features, replays = (Output(),), Replays()
    (of_longer,) = prefill(replays, features, LONGER)
    (of_shorter,) = prefill(replays, features, PROMPT)
    replays.begin(features, torch.tensor([[5, 6, 7, 8, 9]]))
    assert replays.next() is of_longer
    replays.begin(features, torch.tensor([[5, 6, 7, 1]]))
    assert replays.next() is of_shorter


def test_a_prompt_that_comes_again_replaces_its_choices():
    features, replays = (Output(),), Replays()
    prefill(replays, features, PROMPT)
    (again,) = prefill(replays, features, PROMPT)
    replays.begin(features, LONGER)
    assert replays.next() is again


def test_choices_live_as_long_as_the_images():
    replays, kept, dropped = Replays(), Output(), Output()
    prefill(replays, (kept, dropped), PROMPT)
    prefill(replays, (kept,), PROMPT)
    del dropped
    gc.collect()
    assert list(replays._known) == [(id(kept),)]
    del kept
    gc.collect()
    assert not replays._known
