# SPDX-License-Identifier: Apache-2.0
"""What the counter of waits takes for one, and what not."""

from __future__ import annotations

import pytest
import torch
from host_waits import DEVICE, HostWaits, on_device, put

FLAGS = torch.tensor([True, False, True])
WAITS = {
    "bool": lambda x: bool(x.any()),
    "int": lambda x: int(x.sum()),
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to the host": lambda x: x.to("cpu"),
    "numpy": lambda x: x.numpy(),
    "iteration": lambda x: [int(value) for value in x[:1]],
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 1),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: torch.bincount(x),
    "equal": lambda x: torch.equal(x, x),
    "flags as index": lambda x: x[x > 1],
    "a value as index": lambda x: x[x.sum() - 6],
    "a value as bound": lambda x: x[: x.sum() - 4],
    "masked_select": lambda x: x.masked_select(x > 1),
    "repeat_interleave": lambda x: x.repeat_interleave(x),
    "one_hot": lambda x: torch.nn.functional.one_hot(x),
    "send": lambda x: torch.ones(3).to(x.device),
    "send like": lambda x: torch.ones(3).to(x),
    "new tensor": lambda x: torch.tensor([1, 2], device=x.device),
    "new scalar": lambda x: torch.tensor(1, device=x.device),
    "index from the host": lambda x: x[torch.tensor([0, 2])],
    "written from the host": lambda x: x.clone().copy_(torch.ones(3)),
    "written to the host": lambda x: torch.ones(3).copy_(x),
}
NO_WAITS = {
    "arithmetic": lambda x: (x + 1) * x.sum() - x.new_ones(3),
    "made there": lambda x: torch.arange(3, device=x.device) + x,
    "gather": lambda x: x.gather(0, x.argsort()) + x[x.clamp(max=2)],
    "masked fill": lambda x: x.clone().masked_fill_(x > 1, 0),
    "flags set to a value": lambda x: x.clone().__setitem__(x > 1, 0),
    "where of three": lambda x: torch.where(x > 1, x, 0),
    "repeat_interleave of a known size": lambda x: x.repeat_interleave(x, output_size=6),
    "sent without waiting": lambda x: torch.ones(3).to(x.device, non_blocking=True) + x,
    "moved to where it is": lambda x: x.to(x.device).to(torch.float32),
    "shape": lambda x: len(x) + x.shape[0] + x.numel(),
    "slice": lambda x: x[1:] + x[:-1] + x[None, 0],
    "on the host": lambda x: torch.ones(3)[FLAGS].sum().item(),
}


def counted(function) -> HostWaits:
    x = put(torch.tensor([1, 2, 3]))
    with HostWaits(owners=[__file__]) as waits:
        function(x)
    return waits


@pytest.mark.parametrize("name", WAITS)
def test_counted(name):
    assert counted(WAITS[name]).total >= 1


@pytest.mark.parametrize("name", NO_WAITS)
def test_not_counted(name):
    assert not counted(NO_WAITS[name]).sites


def test_sites():
    waits = counted(lambda x: [x.tolist(), x.nonzero()])
    assert sorted(what for _, what in waits.sites) == ["nonzero", "tolist"]
    assert all(site.startswith("tests/test_host_waits.py:") for site, _ in waits.sites)


def test_places():
    x = put(torch.ones(2, 3))
    with HostWaits():
        assert x.device == DEVICE != torch.ones(3).device
        assert on_device(x.mT) and on_device(x.max(1).values) and all(map(on_device, x))
        assert on_device(torch.zeros(3, device=x.device)) and not on_device(torch.zeros(3))
        assert not on_device(x.cpu()) and not on_device(x.to("cpu")) and on_device(x.cpu().to(x.device))
        with pytest.raises(AssertionError, match="host and device"):
            x + torch.ones(3)
