# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: a single one, or those that `torchrun` or `accelerate launch` started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from vtprune.errors import ConfigError
from vtprune.eval.axes import values_of
from vtprune.eval.config import EvalConfig

T = TypeVar("T")

_TIMEOUT = timedelta(hours=2)
"""How long a process that has finished its part of a cell waits for the others."""


def launched() -> int:
    """Number of processes that a launcher started, on all machines; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


@dataclass(frozen=True)
class Processes:
    """This process and the number of processes. All of them call the methods in the same order."""

    index: int
    count: int
    device: str | None = None
    """of this process, if there are several; a single one takes that of each study"""

    @classmethod
    def start(cls, config: EvalConfig) -> Processes:
        """Joins the other processes, if a launcher says that there are any. `config` has no device `auto` any more.

        Raises:
            ConfigError: the devices do not work with several processes, or a launcher started one instead of several.
        """
        count = launched()
        if count == 1:
            _refuse_simple_launcher()
            return cls(0, 1)
        import torch
        from accelerate import PartialState

        device = config.device
        if config.device_map is not None:
            raise ConfigError(f"device_map takes all accelerators for one process; there are {count}: leave it out")
        if device not in ("cpu", "cuda"):
            listed = " and ".join(map(repr, values_of(device)))
            raise ConfigError(f"device {listed} is not for {count} processes: expected 'cpu', or 'cuda', a GPU each")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if device == "cuda" and torch.cuda.device_count() < local:
            raise ConfigError(f"{local} processes on this machine, which shows {torch.cuda.device_count()} GPUs")
        state = PartialState(cpu=device == "cpu", timeout=_TIMEOUT)
        return cls(state.process_index, state.num_processes, str(state.device))

    @property
    def first(self) -> bool:
        """Whether this is the process that reads and writes the shared files."""
        return self.index == 0

    def share(self, value: T) -> T:
        """The `value` of the first process."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def end(self) -> None:
        """Leaves the other processes. A process that fails does not call this; it ends without waiting."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()


def _refuse_simple_launcher() -> None:
    # `accelerate launch --cpu --num_processes 2` starts one process; the environment still says two.
    if os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ and "RANK" not in os.environ:
        raise ConfigError(
            "accelerate launch was asked for several processes and started one, as it does with --cpu; use "
            "torchrun --nproc_per_node N -m vtprune eval CONFIG"
        )
