# SPDX-License-Identifier: Apache-2.0
"""The score that CLS attention gives to patches."""

import torch

from vtprune.ops.cls_attention import cls_score


def test_cls_score_sums_layers_and_averages_heads():
    rows = torch.rand(2, 3, 4, 10, generator=torch.Generator().manual_seed(0))
    expected = sum(rows[:, layer].sum(1) / 4 for layer in range(3))
    torch.testing.assert_close(cls_score(rows), expected)
    assert cls_score(rows.bfloat16()).dtype == torch.float32
