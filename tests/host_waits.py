# SPDX-License-Identifier: Apache-2.0
"""Counts, on a CPU, what would make the host wait for an accelerator.

A tensor is either *on the device* or on the host, as a mark says. Parameters, buffers and inputs are put on the device;
what is computed from a tensor there, or made with its `device`, is there, too. So code under test runs the way it would
with an accelerator: it asks for `x.device`, and moves what it has to. Reading a value of the device, or sending values
there without `non_blocking=True`, is a wait, as it is with CUDA. An operation on tensors of both places is an error, as
it is there.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cpu", 1)
"""What tensors on the device say of themselves: unequal to the CPU, but models treat it as one."""
_READS = {
    "_local_scalar_dense": "a single value",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "equal": "equal",
    "bincount": "bincount",
    "_unique": "unique",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "unique_dim_consecutive": "unique",
    "multinomial": "multinomial",
    "_linalg_check_errors": "linalg",
    "_linalg_eigh": "linalg",
    "_linalg_svd": "linalg",
}
"""Operations that read on the host what they compute on the device."""
_TAKEN = (Tensor.cpu, Tensor.tolist, Tensor.numpy, Tensor.item, Tensor.__bool__, Tensor.__array__)

_MOVES = (Tensor.to, torch.as_tensor, torch.tensor, torch.asarray)
_MIXING = (Tensor.__getitem__, Tensor.__setitem__, Tensor.copy_, Tensor.index_put, Tensor.index_put_)
"""Functions that take tensors of both places, and move what they need."""


def _parts(value: Any) -> Iterator[Tensor]:
    """All tensors in an argument or a result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _parts(part)
    elif isinstance(value, dict):
        yield from _parts(list(value.values()))
    elif isinstance(value, slice):
        yield from _parts((value.start, value.stop, value.step))


def on_device(value: Tensor) -> bool:
    return getattr(value, "_on_device", False)


def put(value: Any) -> Any:
    """Put all tensors of a value, or parameters and buffers of a module, on the device."""
    if isinstance(value, nn.Module):
        put([*value.parameters(), *value.buffers()])
    for tensor in _parts(value):
        tensor._on_device = True
    return value


def _place(argument: Any) -> bool | None:
    """Whether an argument names the device (True), or the host (False); None if it is no place."""
    if isinstance(argument, torch.device):
        return argument == DEVICE
    return argument == str(DEVICE) if isinstance(argument, str) and argument.startswith("cpu") else None


class _Operations(TorchDispatchMode):
    """Notes what operations read, which functions of torch call inside, too."""

    def __init__(self, waits: HostWaits):
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._waits.there and (what := self._read(func.overloadpacket.__name__, args, kwargs)):
            self._waits.note(what)
        return func(*args, **kwargs)

    @staticmethod
    def _read(name: str, args: tuple, kwargs: dict) -> str | None:
        if name == "repeat_interleave":
            return None if kwargs.get("output_size") is not None else "repeat_interleave"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            flags = any(index.dtype in (torch.bool, torch.uint8) for index in _parts(args[1]))
            # Setting one value by flags is a masked fill.
            return "flags as index" if flags and (name == "index" or args[2].numel() > 1) else None
        if name == "isin" and all(isinstance(part, Tensor) for part in args[:2]):  # many are sorted first
            return "isin" if args[1].numel() >= 10 * args[0].numel() ** 0.145 else None
        return _READS.get(name)


class HostWaits(TorchFunctionMode):
    """While it lasts, `sites` counts the waits in code of vtprune: (file:line, what) -> times."""

    def __init__(self, owners: Iterable[str] = ("/vtprune/", "/adapters/")):
        """owners: parts of the paths of the files whose waits count."""
        super().__init__()
        self.sites: Counter[tuple[str, str]] = Counter()
        self.there = False
        """Whether the function that runs is one on the device."""
        self._owners = tuple(owners)
        self._operations = _Operations(self)

    @property
    def total(self) -> int:
        return sum(self.sites.values())

    def __enter__(self):
        self._operations.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._operations.__exit__(*error)

    def note(self, what: str) -> None:
        """Count a wait at the line of vtprune that is nearest, unless a model's own code is nearer."""
        frame = sys._getframe(1)
        while frame is not None:
            path = frame.f_code.co_filename
            if "/transformers/models/" in path or "/transformers/generation/" in path:
                return
            if any(owner in path for owner in self._owners) and "/torch/" not in path:
                self.sites[f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno}", what] += 1
                return
            frame = frame.f_back

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:
            return DEVICE if on_device(args[0]) else func(*args, **kwargs)
        inputs = list(_parts((args, kwargs)))
        there = any(map(on_device, inputs))
        if there and func in _TAKEN:
            self.note(func.__name__)
            result = func(*args, **kwargs)
            return result.clone() if isinstance(result, Tensor) else result
        goal = there
        places = [_place(argument) for argument in (*args, *kwargs.values())]
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            goal = on_device(args[1])
        elif any(place is not None for place in places):
            goal = any(places)
        args = tuple(torch.device("cpu") if place else a for a, place in zip(args, places, strict=False))
        kwargs = {name: torch.device("cpu") if _place(value) else value for name, value in kwargs.items()}
        moves = func in _MOVES
        sends = moves and goal and not (inputs and on_device(inputs[0]))
        if sends:
            there = False
        elif moves and there and not goal:
            self.note("read")
        elif there:
            self._check_places(func, args, inputs)
        before, self.there = self.there, there
        try:
            result = func(*args, **kwargs)
        finally:
            self.there = before
        if sends and result.numel() and not kwargs.get("non_blocking"):
            self.note("send")
        if moves and goal != (bool(inputs) and on_device(inputs[0])):
            result = result.clone()  # which has a mark of its own
        return self._put(result) if goal else result

    def _check_places(self, func, args: tuple, inputs: list[Tensor]) -> None:
        """Count what moves by itself, and raise for an operation on tensors of both places."""
        host = [value for value in inputs if value.ndim and not on_device(value)]
        if not host:
            return
        if func in _MIXING and (on_device(args[0]) or func is not Tensor.__getitem__):
            self.note("send" if on_device(args[0]) else "read")
            return
        shapes = [(tuple(value.shape), on_device(value)) for value in inputs]
        raise AssertionError(f"{getattr(func, '__name__', func)}: tensors of host and device: {shapes}")

    @staticmethod
    def _put(result: Any) -> Any:
        if isinstance(result, Iterator):
            return map(put, result)
        return put(result)
