# SPDX-License-Identifier: Apache-2.0
"""Between projector and LLM: drops or merges visual tokens before the first decoder layer."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.methods.base import BeforeLLM
from vtprune.stages.cache import check_first_turn
from vtprune.stages.call import Call
from vtprune.stages.cutting import cut_sequence
from vtprune.stages.encoded import EncodedMedia, check_encoded, per_group
from vtprune.stages.encoder import EncoderRecorder
from vtprune.stages.layout import Groups
from vtprune.stages.question import Text
from vtprune.stages.reading import Chooser, visual_tokens
from vtprune.tokens import Grid, HostCopy, Selection


def prune_before_llm(
    call: Call, hidden: Tensor, methods: list[BeforeLLM], recorder: EncoderRecorder, text: Text | None, choose: Chooser
) -> Tensor:
    """Apply the methods in order to the embeddings (batch, length, dim) of a prefill; returns the shorter ones.

    text: the question that the session was given.
    """
    check_first_turn(call.cache, call.past)
    if recorder.merges:
        hidden = _drop_merged(call, hidden, recorder)
    for method in methods:
        by_crop = call.crop_groups()
        groups = by_crop if method.scope == "crop" else call.image_groups()
        lengths = groups.valid.sum(1)
        budget = method.budgets(lengths, groups.images)
        if bool((budget >= lengths).all()):
            continue
        crops, layouts = _crops(call, groups, by_crop)
        tokens = visual_tokens(
            method,
            call.adapter.shape,
            groups,
            groups.gather(hidden),
            EncodedMedia(call, groups, recorder, text).read,
            budget=budget,
            crops=crops,
            layouts=layouts,
            kinds=tuple(call.media.kinds[image] for image in groups.images.tolist()),
            copy=HostCopy(lengths, budget, crops.cpu()),
        )
        selection = choose(method, tokens)
        cut = cut_sequence(
            call,
            hidden,
            groups,
            selection,
            layer=0,
            compact=method.positions == "compact",
            keep_separators=method.keep_separators,
        )
        if cut is not None:
            hidden = cut[0]
    return hidden


def _drop_merged(call: Call, hidden: Tensor, recorder: EncoderRecorder) -> Tensor:
    """Of visual tokens that are copies of one token of the encoder, leave the one it stood for, or else the first."""
    check_encoded(call)
    if all(encoding.merge is None for encoding in call.media.encodings):
        return hidden
    groups = call.crop_groups()
    into, original = (per_group(values, call, groups) for values in recorder.copied_into(call.media.encodings))
    valid = groups.valid
    count, width = valid.shape
    slots = torch.arange(width).expand_as(valid)
    # Tokens of one group with one number go together; what is no copy has a number of its own.
    numbers = torch.where(into == -1, int(into.max()) + 1 + slots, into)
    groups_of = torch.arange(count)[:, None]
    together = torch.stack([groups_of.expand_as(numbers)[valid], numbers[valid]])
    clusters = together.unique(dim=1, return_inverse=True)[1]
    rank = slots[valid] + width * ~original[valid]
    first = rank.new_full((int(clusters.max()) + 1,), 2 * width).scatter_reduce(0, clusters, rank, "amin") % width
    sources = torch.full_like(slots, -1)
    sources[valid] = torch.where(into[valid] == -2, -1, first[clusters])
    keep = valid & (sources == slots)
    cut = cut_sequence(call, hidden, groups, Selection(keep, None, sources), layer=0, compact=recorder.compact)
    return hidden if cut is None else cut[0]


def _crops(call: Call, groups: Groups, by_crop: Groups) -> tuple[Tensor, tuple[tuple[Grid | None, ...], ...]]:
    """Number of each token's crop within its group, and each crop's layout: see `VisualTokens`."""
    media = call.media
    labels = groups.gather(call.crop_labels()).masked_fill(~groups.valid, -1)
    alive = by_crop.valid.sum(1).tolist()
    grids = [
        grid if grid is not None and count == len(grid) else None
        for grid, count in zip(media.grids, alive, strict=True)
    ]
    # The crops of an image are numbered one after another.
    if len(groups.rows) == len(grids):
        first, layouts = torch.arange(len(grids)), tuple((grid,) for grid in grids)
    else:
        counts = torch.bincount(media.crop_images, minlength=len(groups.rows))
        first, parts = counts.cumsum(0) - counts, torch.arange(len(grids)).split(counts.tolist())
        layouts = tuple(tuple(grids[crop] for crop in part.tolist()) for part in parts)
    return torch.where(labels >= 0, labels - first[:, None], -1), layouts
