# SPDX-License-Identifier: Apache-2.0
"""SparseVLM's text raters: the text tokens that resemble the image most."""

import torch
from torch import Tensor


def text_raters(visual: Tensor, text: Tensor, visual_valid: Tensor, text_valid: Tensor) -> Tensor:
    """Mark the text tokens that resemble the visual tokens more than average (SparseVLM, arXiv 2410.04417).

    Every visual token has one vote. A softmax over its dot products with the text tokens divides the vote among them.
    Raters are the text tokens with more votes than the mean. If there are none, for example with a single text token,
    all text tokens are raters.

    Args:
        visual: ``(groups, tokens, dim)`` input embeddings.
        text: ``(groups, text tokens, dim)`` input embeddings.
        visual_valid: ``(groups, tokens)`` bool.
        text_valid: ``(groups, text tokens)`` bool.

    Returns:
        ``(groups, text tokens)`` bool.
    """
    products = visual.float() @ text.float().mT
    votes = products.masked_fill(~text_valid[:, None], -torch.inf).softmax(-1).masked_fill(~visual_valid[..., None], 0)
    votes = votes.sum(1).masked_fill(~text_valid, 0)
    raters = text_valid & (votes > votes.sum(1, keepdim=True) / text_valid.sum(1, keepdim=True).clamp(min=1))
    return torch.where(raters.any(1, keepdim=True), raters, text_valid)
