# SPDX-License-Identifier: Apache-2.0
"""Similarity of each token to one vector: the CLS token (GLSim), or a feature of the text (Recoverable Compression)."""

from typing import Literal

from torch import Tensor
from torch.nn.functional import cosine_similarity


def similarity_to(query: Tensor, features: Tensor, metric: Literal["cosine", "l1", "l2"] = "cosine") -> Tensor:
    """Similarity of every token to one vector; attention is not used.

    The score of GLSim (arXiv 2407.12891) is the similarity of the CLS token to the patches in the encoder's normalised
    output. GLSim takes the most similar patches.

    Args:
        query: ``(..., dim)``.
        features: ``(..., tokens, dim)``.
        metric: the cosine, or the negative mean absolute (``"l1"``) or squared (``"l2"``) difference. A larger value
            always means more similar.

    Returns:
        ``(..., tokens)`` float32; the cosine with a zero vector is 0.
    """
    query, features = query.float().unsqueeze(-2), features.float()
    if metric == "cosine":
        return cosine_similarity(query, features, dim=-1, eps=1e-8)
    difference = query - features
    return -(difference.abs() if metric == "l1" else difference.square()).mean(-1)
