# SPDX-License-Identifier: Apache-2.0
"""What the CLS token of a vision encoder looks at, summed over layers."""

from torch import Tensor


def cls_score(rows: Tensor) -> Tensor:
    """Sum over layers of the head-averaged attention that CLS pays to each patch (VTC-CLS, arXiv 2412.05819).

    Args:
        rows: ``(..., layers, heads, tokens)`` post-softmax rows of the CLS query over the visual tokens. Not
            renormalised where the CLS column has been left out: the share that went to CLS is lost.

    Returns:
        ``(..., tokens)`` float32.
    """
    return rows.float().mean(dim=-2).sum(dim=-2)
