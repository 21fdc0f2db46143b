# SPDX-License-Identifier: Apache-2.0
"""Random numbers that depend only on a seed and on one key a row (Random, Random patches, Token correlation)."""

import zlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def text_key(ids: Sequence[int]) -> int:
    """A number that depends on a text's token ids alone."""
    return zlib.crc32(str(list(ids)).encode())


def seeded_uniform(keys: Iterable[int], seed: int, width: int) -> Tensor:
    """Uniform draws in [0, 1); the global generators are neither read nor changed.

    Args:
        keys: one integer a row.
        seed: at least 0, the same for all rows.
        width: number of draws in a row. A larger width does not change the first draws.

    Returns:
        ``(rows, width)`` float32 on the CPU.
    """
    generators = (torch.Generator().manual_seed(seed * 1_000_003 + key) for key in keys)
    return torch.stack([torch.rand(width, generator=generator) for generator in generators])
