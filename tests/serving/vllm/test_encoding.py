# SPDX-License-Identifier: Apache-2.0
"""The encoder is handed no more at once than memory was measured with."""

from __future__ import annotations

import torch

from vtprune.serving.plan import adapter_of
from vtprune.serving.vllm.encoding import sliced, slices

from .checkpoints import CHECKPOINTS


def test_slices_hold_no_more_than_the_limit_or_one_medium():
    assert slices([10, 10, 10, 50, 5], 20) == [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    assert slices([10, 10], 20) == [range(0, 2)]
    assert slices([50], 20) == [range(0, 1)]


def test_arguments_are_cut_by_medium():
    qwen, internvl, llava = (adapter_of(CHECKPOINTS[name].config()) for name in ("qwen2_5_vl", "internvl", "llava"))
    grids = torch.tensor([[1, 4, 6], [1, 2, 2], [1, 6, 6]])
    rows = torch.arange(24 + 4 + 36)[:, None].float()
    cut = sliced(qwen, "image", {"pixel_values": rows, "image_grid_thw": grids}, range(1, 3), 3)
    assert torch.equal(cut["pixel_values"], rows[24:]) and torch.equal(cut["image_grid_thw"], grids[1:])
    tiles = {"pixel_values": rows[:5], "image_num_patches": torch.tensor([3, 1, 1]), "image_token_id": torch.tensor(7)}
    cut = sliced(internvl, "image", tiles, range(0, 1), 3)
    assert torch.equal(cut["pixel_values"], rows[:3]) and cut["image_num_patches"].tolist() == [3]
    assert cut["image_token_id"] == 7
    cut = sliced(llava, "image", {"pixel_values": rows[:3]}, range(2, 3), 3)
    assert torch.equal(cut["pixel_values"], rows[2:3])
