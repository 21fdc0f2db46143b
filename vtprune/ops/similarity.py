# SPDX-License-Identifier: Apache-2.0
"""How alike each token is to one given vector: the CLS token, or a feature of the text."""

from typing import Literal

from torch import Tensor
from torch.nn.functional import cosine_similarity


def similarity_to(query: Tensor, features: Tensor, metric: Literal["cosine", "l1", "l2"] = "cosine") -> Tensor:
    """Similarity of every token to one vector, without any attention.

    Between the CLS token and the patches of an encoder's normalised output it is the score of GLSim (arXiv
    2407.12891), which takes the patches most alike.

    Args:
        query: ``(..., dim)``.
        features: ``(..., tokens, dim)``.
        metric: the cosine, or minus the mean absolute (``"l1"``) or squared (``"l2"``) difference, so that larger is
            always more alike.

    Returns:
        ``(..., tokens)`` float32; the cosine with a zero vector is 0.
    """
    query, features = query.float().unsqueeze(-2), features.float()
    if metric == "cosine":
        return cosine_similarity(query, features, dim=-1, eps=1e-8)
    difference = query - features
    return -(difference.abs() if metric == "l1" else difference.square()).mean(-1)
