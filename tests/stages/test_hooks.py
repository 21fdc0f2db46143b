# SPDX-License-Identifier: Apache-2.0
import torch
from torch import nn

from vtprune.stages.hooks import hidden_of, with_hidden

OLD, NEW = torch.tensor([1.0]), torch.tensor([2.0])


def test_states_passed_by_place():
    kwargs = {"attention_mask": None}
    assert hidden_of((OLD, "more"), kwargs) is OLD
    args, after = with_hidden((OLD, "more"), kwargs, NEW)
    assert args[0] is NEW and args[1:] == ("more",) and after is kwargs


def test_states_passed_by_name():
    kwargs = {"hidden_states": OLD, "attention_mask": None}
    assert hidden_of((), kwargs) is OLD
    args, after = with_hidden((), kwargs, NEW)
    assert args == () and after["hidden_states"] is NEW and after["attention_mask"] is None
    assert kwargs["hidden_states"] is OLD, "the caller's own arguments were changed"


class Layer(nn.Module):
    def forward(self, hidden_states, factor=1.0):
        return hidden_states * factor


def test_a_pre_hook_can_return_what_with_hidden_gives():
    layer = Layer()
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: with_hidden(args, kwargs, hidden_of(args, kwargs) + 1), with_kwargs=True
    )
    assert layer(OLD, factor=3.0).item() == 6
    assert layer(hidden_states=OLD, factor=3.0).item() == 6
