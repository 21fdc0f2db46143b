# SPDX-License-Identifier: Apache-2.0
"""What the CLS token of a vision encoder looks at, summed over layers."""

from torch import Tensor


def cls_score(rows: Tensor) -> Tensor:
    """Sum over layers of the head-averaged attention that CLS pays to each patch (VTC-CLS, arXiv 2412.05819).

    Args:
        rows: ``(..., layers, heads, patches)`` post-softmax attention of the CLS query over the patches, not
            renormalised: what CLS pays to itself is simply missing.

    Returns:
        ``(..., patches)`` float32.
    """
    return rows.float().mean(dim=-2).sum(dim=-2)
