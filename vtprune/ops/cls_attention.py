# SPDX-License-Identifier: Apache-2.0
"""Attention of the vision encoder's CLS token, summed over layers (VTC-CLS and other methods)."""

from torch import Tensor


def cls_score(rows: Tensor) -> Tensor:
    """Attention that CLS pays to each patch, averaged over heads and summed over layers (VTC-CLS, arXiv 2412.05819).

    Args:
        rows: ``(..., layers, heads, patches)`` post-softmax attention of the CLS query over the patches. It is not
            renormalised, so rows sum to less than one by the attention that CLS pays to itself.

    Returns:
        ``(..., patches)`` float32.
    """
    return rows.float().mean(dim=-2).sum(dim=-2)
