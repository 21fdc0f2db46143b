# SPDX-License-Identifier: Apache-2.0
"""Hooks on decoder layers are there for the calls that want them, and for these alone."""

import threading

import pytest
import torch
from torch import nn

import vtprune
from vtprune import graphs
from vtprune.stages.resting import RestingHooks
from vtprune.testing import families

TRANSPRUNE = {"name": "transprune", "keep_ratio": 0.5, "positions": "original"}


@pytest.fixture(autouse=True)
def _without_graphs(monkeypatch):
    """As in a process in which nothing was compiled."""
    monkeypatch.setattr(graphs, "_between", False)


def made(blocks: int = 2):
    """Blocks with one hook each, which notes that it ran, and what hands them on."""
    parent, ran, hooks = nn.ModuleList(nn.Identity() for _ in range(blocks)), [], RestingHooks()
    for i, block in enumerate(parent):
        hooks.add(parent, block, block.register_forward_pre_hook(lambda module, args, i=i: ran.append(i)))

    def run() -> list[int]:
        ran.clear()
        for block in parent:
            block(0)
        return list(ran)

    return parent, hooks, run


def in_a_thread(work) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_they_come_and_go():
    _, hooks, run = made()
    assert run() == [0, 1]
    hooks.rest()
    assert run() == []
    hooks.want()
    assert run() == [0, 1]
    hooks.leave()
    hooks.rest()
    assert run() == []


def test_they_stay_while_a_call_of_another_thread_wants_them():
    _, hooks, run = made()
    hooks.want()
    in_a_thread(hooks.rest)
    assert run() == [0, 1]
    hooks.leave()
    in_a_thread(hooks.rest)
    assert run() == []


def test_they_come_back_in_front_of_hooks_that_came_after_them():
    block, order, hooks = nn.Identity(), [], RestingHooks()
    parent = nn.ModuleList([block])
    hooks.add(parent, block, block.register_forward_pre_hook(lambda module, args: order.append("ours")))
    hooks.rest()
    block.register_forward_pre_hook(lambda module, args: order.append("theirs"))
    hooks.want()
    block(0)
    assert order == ["ours", "theirs"]


def test_beside_other_hooks_they_stay():
    parent, hooks, run = made()
    parent[1].register_forward_pre_hook(lambda module, args: None)
    hooks.rest()
    assert run() == [0, 1]


def _compiled(parent):
    parent[1].compile(backend="eager")


def _replaced(parent):
    parent[1] = torch.compile(parent[1], backend="eager")


@pytest.mark.parametrize("change", [_compiled, _replaced])
@pytest.mark.parametrize("first", [False, True])
def test_a_part_that_becomes_a_graph_has_them_from_then_on(change, first):
    parent, hooks, run = made()
    if not first:
        hooks.rest()
    change(parent)
    hooks.rest()
    assert run() == [0, 1]


def test_what_is_removed_does_not_come_back():
    parent, hooks, run = made()
    handles = [place.handle for place in hooks._places]
    hooks.rest()
    for handle in handles:
        handle.remove()
    hooks.forget()
    hooks.want()
    assert run() == [] and not any(block._forward_pre_hooks for block in parent)


def hooked(model) -> int:
    """Decoder layers and parts of them with hooks."""
    parts = [part for layer in model.model.language_model.layers for part in layer.modules()]
    return sum(bool(part._forward_pre_hooks) or bool(part._forward_hooks) for part in parts)


@torch.inference_mode()
def test_a_step_finds_none_and_a_prefill_all():
    model = families.build("llava")
    inputs = families.batch("llava", model, 1).inputs
    before = hooked(model)
    seen = []
    layer = model.model.language_model.layers[0]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: (seen.append(hooked(model)), forward(*args, **kwargs))[1]
    with vtprune.prune(model, TRANSPRUNE):
        everywhere = hooked(model)
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert everywhere > before and hooked(model) == before
    assert seen == [everywhere, 0, 0] * 2
