# SPDX-License-Identifier: Apache-2.0
"""Values go to an accelerator without a wait, and several come from it with one."""

from __future__ import annotations

import torch
from host_waits import DEVICE, HostWaits, on_device, put

from vtprune.devices import read, send


def test_values_are_sent_without_a_wait():
    x = torch.tensor([1, 2])
    with HostWaits() as waits:
        there = send(x, DEVICE)
        assert on_device(there) and send(there, DEVICE).device == DEVICE
        assert not on_device(send(x, torch.device("cpu")))
    assert not waits.sites and there.tolist() == [1, 2]


def test_several_values_are_read_with_one_wait():
    numbers, flags = put(torch.tensor([[1, -2], [3, 4]])), put(torch.tensor([True, False]))
    with HostWaits() as waits:
        values = read(numbers, torch.tensor(7), flags)
    assert waits.total == 1 and not any(map(on_device, values))
    assert [value.tolist() for value in values] == [[[1, -2], [3, 4]], 7, [True, False]]
    assert [value.dtype for value in values] == [torch.long, torch.long, torch.bool]


def test_what_is_on_the_cpu_is_read_as_it_is():
    x, y = torch.tensor([1, 2]), torch.tensor([True])
    with HostWaits() as waits:
        assert read(x, y)[0] is x and read(x)[0] is x
    assert not waits.sites
