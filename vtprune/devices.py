# SPDX-License-Identifier: Apache-2.0
"""Between the CPU and an accelerator, which is waited for as seldom as can be.

Reading a value of an accelerator waits until all that was queued there has run. So does sending values there, unless
it is told not to wait.
"""

from __future__ import annotations

import torch
from torch import Tensor

CPU = torch.device("cpu")


def send(x: Tensor, device: torch.device) -> Tensor:
    """x on a device. What comes from the CPU is sent without a wait."""
    # The CPU's side is copied before the call returns, except on Apple's GPUs, which may read it later.
    return x.to(device, non_blocking=x.device == CPU and device.type != "mps")


def read(*values: Tensor) -> list[Tensor]:
    """Tensors of integers or flags on the CPU, with one wait for all of them; none if they are there."""
    if len(values) == 1 or all(value.device == CPU for value in values):
        return [value.cpu() for value in values]
    device = next(value.device for value in values if value.device != CPU)
    joined = torch.cat([send(value.reshape(-1).long(), device) for value in values]).cpu()
    parts = joined.split([value.numel() for value in values])
    return [part.view(value.shape).to(value.dtype) for part, value in zip(parts, values, strict=True)]
