# SPDX-License-Identifier: Apache-2.0
"""Randomness that depends on a seed and on a key a row, on nothing else."""

from collections.abc import Iterable

import torch
from torch import Tensor


def seeded_uniform(keys: Iterable[int], seed: int, width: int) -> Tensor:
    """Uniform draws in [0, 1), without a look at the global generators.

    Args:
        keys: one integer a row.
        seed: at least 0, the same for all rows.
        width: draws of a row; the first ones do not depend on how many there are.

    Returns:
        ``(rows, width)`` float32 on the CPU.
    """
    generators = (torch.Generator().manual_seed(seed * 1_000_003 + key) for key in keys)
    return torch.stack([torch.rand(width, generator=generator) for generator in generators])
