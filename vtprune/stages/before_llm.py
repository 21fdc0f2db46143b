# SPDX-License-Identifier: Apache-2.0
"""Between projector and LLM: drops or merges visual tokens before the first decoder layer."""

from __future__ import annotations

import functools
from collections.abc import Callable

from einops import rearrange
from torch import Tensor

from vtprune.errors import UnsupportedStageError
from vtprune.layout import Groups
from vtprune.methods.base import BeforeLLM, Method
from vtprune.signals import ClsAttention, EncoderFeatures, SampleKeys, TextEmbeddings
from vtprune.stages.call import Call
from vtprune.stages.encoder import EncoderTap
from vtprune.tokens import Selection, VisualTokens

Chooser = Callable[[Method, VisualTokens], Selection]


def prune_before_llm(
    call: Call, hidden: Tensor, methods: list[BeforeLLM], tap: EncoderTap, text: Callable, choose: Chooser
) -> Tensor:
    """Apply the methods in order to the embeddings (batch, length, dim) of a prefill; returns the shorter ones.

    text: `text(call, groups, request)` -> one (text tokens, dim) tensor a group, see `vtprune.question`.
    """
    for method in methods:
        groups = call.image_groups()
        lengths = groups.valid.sum(1).cpu()
        budget = method.budgets(lengths)
        if bool((budget >= lengths).all()):
            continue
        images = call.images
        whole = tuple(
            grid if grid is not None and length == len(grid) else None
            for grid, length in zip(images.grids, lengths.tolist(), strict=True)
        )
        tokens = VisualTokens(
            features=groups.gather(hidden),
            valid=groups.valid,
            budget=budget.to(hidden.device),
            signals=functools.partial(_signal, call, groups, tap, text),
            grids=whole,
            shape=call.adapter.shape,
        )
        selection = choose(method, tokens)
        cut = call.apply(hidden, groups, selection, layer=0, compact=method.positions == "compact")
        if cut is not None:
            hidden = cut[0]
    return hidden


def _signal(call: Call, groups: Groups, tap: EncoderTap, text: Callable, request):
    if isinstance(request, TextEmbeddings):
        return text(call, groups, request)
    if isinstance(request, SampleKeys):
        pairs = zip(groups.rows.tolist(), call.images.encoded.tolist(), strict=True)
        return [call.prompt_key(row) + tap.image_key(image) for row, image in pairs]
    if not isinstance(request, (EncoderFeatures, ClsAttention)):
        raise UnsupportedStageError(f"{type(request).__name__} is not available before the LLM")
    images = call.images
    visual = images.labels >= 0
    embeddings = call.embeddings[visual.to(call.embeddings.device)]
    tap.check(embeddings, images.encoded[images.labels[visual]], images.slots[visual])
    if isinstance(request, EncoderFeatures):
        return _per_image(tap.features, call, groups)
    rows = rearrange(tap.cls_rows(request.layers), "images layers heads tokens -> images tokens layers heads")
    return rearrange(_per_image(rows, call, groups), "groups tokens layers heads -> groups layers heads tokens")


def _per_image(values: Tensor, call: Call, groups: Groups) -> Tensor:
    """Values (encoded images, tokens, ...) of the encoder for the tokens alive: (groups, tokens, ...)."""
    slots = groups.gather(call.slots()).to(values.device)
    images = call.images.encoded.to(values.device)
    taken = values[images[:, None], slots]
    valid = groups.valid.to(values.device)
    return taken.masked_fill(~valid.view(*valid.shape, *[1] * (taken.ndim - 2)), 0)
