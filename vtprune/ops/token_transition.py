# SPDX-License-Identifier: Apache-2.0
"""TransPrune's token transition variation: how much a part of a decoder layer changes each token."""

import torch
from torch import Tensor

_NORM_FLOOR = 1e-8


def token_transition(
    inputs: Tensor, outputs: Tensor, valid: Tensor | None = None, *, reference_quirks: bool = False
) -> Tensor:
    """Transition score of one sub-block (attention or MLP) of a decoder layer (TransPrune, arXiv 2507.20630).

    ``x`` is the input of the sub-block, after its RMSNorm, and ``y`` its output, before the residual addition. The
    score of a token is ``||y|| / ||x||`` (change of length) times the softmax of ``1 - cos(x, y)`` (change of
    direction), taken over the tokens of the sample.

    Args:
        inputs: ``(batch, tokens, dim)``.
        outputs: ``(batch, tokens, dim)``.
        valid: ``(batch, tokens)`` bool, False for padding; by default all tokens count.
        reference_quirks: take the softmax over all samples together, as the reference implementation does. Scores
            then depend on the other samples of the batch.

    Returns:
        ``(batch, tokens)`` float32, zero where not valid.
    """
    inputs, outputs = inputs.float(), outputs.float()
    length_in = torch.linalg.vector_norm(inputs, dim=-1).clamp_min(_NORM_FLOOR)
    length_out = torch.linalg.vector_norm(outputs, dim=-1)
    cosine = torch.linalg.vecdot(inputs, outputs) / (length_in * length_out.clamp_min(_NORM_FLOOR))
    turn = 1 - cosine
    if valid is not None:
        turn = turn.masked_fill(~valid, -torch.inf)
    weights = turn.flatten().softmax(dim=0).view_as(turn) if reference_quirks else turn.softmax(dim=1)
    score = length_out / length_in * weights
    return score if valid is None else score.masked_fill(~valid, 0.0)
