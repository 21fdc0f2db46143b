# SPDX-License-Identifier: Apache-2.0
"""Methods inside the vision encoder: several cuts, merging and dropping, against a tower of one image at a time."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vtprune
from vtprune.signals import AttentionReceived, ClsAttention, EncoderKeys
from vtprune.testing import families
from vtprune.tokens import Grid, Selection

FIRST, SECOND = 1, 2
SEEN: list = []


@dataclass(frozen=True, kw_only=True)
class Thinning(vtprune.InEncoder):
    """Merges every token whose `low` is below 0 into the one before it, if that stays; a layer later drops every token
    whose `high` is above 0."""

    name: ClassVar[str] = "thinning"
    signal: ClassVar[str] = "-"
    needs_budget: ClassVar[bool] = False

    def cuts(self, shape):
        return FIRST, SECOND

    def budgets(self, lengths):
        SEEN.append(lengths)
        return lengths // 3

    def select(self, tokens):
        SEEN.append(tokens)
        if tokens.layer == SECOND:
            return Selection(tokens.valid & (high(tokens.features) <= 0))
        keep = tokens.valid & ~goes(low(tokens.features))
        slots = torch.arange(keep.shape[1]).expand_as(keep)
        sources = torch.where(keep, slots, slots - 1)
        ones = torch.ones_like(tokens.features[..., 0])
        sizes = torch.zeros_like(ones).scatter_add(1, sources, ones)
        sums = torch.zeros_like(tokens.features)
        sums = sums.scatter_add(1, sources[..., None].expand_as(sums), tokens.features)
        return Selection(keep, sums / sizes.clamp(min=1)[..., None], sources)


def low(features):
    return features[..., 0] - features[..., 1]


def high(features):
    return features[..., 2] - features[..., 3] - 0.5


def goes(scores):
    """(crops, tokens) bool: below 0, and the one before stays."""
    below = scores < 0
    below[:, 0] = False
    gone = torch.zeros_like(below)
    for token in range(1, below.shape[1]):
        gone[:, token] = below[:, token] & ~gone[:, token - 1]
    return gone


def thinned_tower(tower, pixels):
    """States that enter each layer and leave the last, queries and keys in each layer, both with the patches that each
    row stands for; the patches that were dropped."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels[None]))
    members = [[i] for i in range(hidden.shape[1])]
    states, rows, dropped = [], [], []
    for index, layer in enumerate(tower.encoder.layers):
        states.append((hidden[0], members))
        normed = layer.layer_norm1(hidden)[0]
        rows.append((layer.self_attn.q_proj(normed), layer.self_attn.k_proj(normed), members))
        hidden = layer(hidden, None)
        tokens = hidden[0]
        if index == FIRST:
            gone = [False, *goes(low(tokens[None, 1:]))[0].tolist()]
            merged, groups = [], []
            for place, one in enumerate(tokens):
                if gone[place]:
                    merged[-1] = (merged[-1] + one) / 2
                    groups[-1] = groups[-1] + members[place]
                else:
                    merged.append(one)
                    groups.append(members[place])
            hidden, members = torch.stack(merged)[None], groups
        if index == SECOND:
            stays = [True, *(high(tokens[1:]) <= 0).tolist()]
            dropped = [i for group, stay in zip(members, stays, strict=True) if not stay for i in group]
            members = [group for group, stay in zip(members, stays, strict=True) if stay]
            hidden = hidden[:, torch.tensor(stays)]
    states.append((hidden[0], members))
    return states, rows, dropped


def spread(values, members, total):
    out = torch.zeros(total, *values.shape[1:])
    for value, group in zip(values, members, strict=True):
        out[group] = value
    return out


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_merging_in_one_layer_and_dropping_in_the_next(attention):
    model = families.shared("llava", attention)
    batch = families.batch("llava", model)
    images, tower = batch.inputs["pixel_values"], model.model.vision_tower
    SEEN.clear()
    projected = []
    with vtprune.prune(model, Thinning()) as session:
        watch = model.model.multi_modal_projector.register_forward_pre_hook(lambda m, args: projected.append(args[0]))
        model(**batch.inputs)
        watch.remove()
    report, whole = session.report, 36
    assert all(lengths.tolist() == [whole] * len(images) for lengths in SEEN[::2])
    first, second = SEEN[1::2]
    assert first.grids == (Grid(6, 6),) * len(images) and second.grids == (None,) * len(images)
    assert first.budget.tolist() == second.budget.tolist() == [whole // 3] * len(images)
    assert not second.valid.all(), "all crops were thinned alike, so that nothing was padded"

    kept, sources = [], []
    columns = [(sample, c) for sample in range(3) for c in report.visual[sample].tolist()]
    for number, (pixels, got) in enumerate(zip(images, projected[0], strict=True)):
        states, _, dropped = thinned_tower(tower, pixels)
        # the projector reads the input of the last layer
        torch.testing.assert_close(got, spread(*states[-2], whole + 1)[1:], atol=1e-5, rtol=1e-5)
        assert 0 < len(dropped) < whole
        groups = states[-2][1][1:]
        kept += [columns[number * whole + group[0] - 1] for group in groups]
        into = {patch: group[0] for group in groups for patch in group}
        sources += [columns[number * whole + into[p] - 1] if p in into else None for p in range(1, whole + 1)]
    assert [(s, c) for s in range(3) for c in report.kept(s, 0).tolist()] == kept
    went = [(s, report.kept(s, 0)[i].item() if i >= 0 else None) for s in range(3) for i in report.sources(s, 0)]
    assert [w if w[1] is not None else None for w in went] == sources


@dataclass(frozen=True, kw_only=True)
class Looking(vtprune.BeforeLLM):
    name: ClassVar[str] = "looking"
    signal: ClassVar[str] = "-"

    def budgets(self, lengths, images):
        return torch.full_like(lengths, -1)

    def signals(self, shape):
        return tuple(kind(layer) for kind in (AttentionReceived, EncoderKeys) for layer in range(4)) + (
            ClsAttention(tuple(range(4))),
        )

    def select(self, tokens):
        SEEN.append({request: tokens[request] for request in self.signals(tokens.shape)} | {"valid": tokens.valid})
        return Selection(tokens.valid)


@torch.no_grad()
def test_what_is_seen_of_layers_that_run_on_fewer_tokens():
    """Attention rows, attention received and keys in every layer, for the visual tokens that are left."""
    model = families.shared("llava")
    batch = families.batch("llava", model)
    images, tower = batch.inputs["pixel_values"], model.model.vision_tower
    SEEN.clear()
    with vtprune.prune(model, [Thinning(), Looking(keep_ratio=0.9)]):
        model(**batch.inputs)
    seen, heads = SEEN[-1], model.config.vision_config.num_attention_heads
    for number, pixels in enumerate(images):
        states, rows, _ = thinned_tower(tower, pixels)
        left = [group[0] for group in states[-2][1][1:]]
        assert seen["valid"][number].sum() == len(left)
        for layer, (queries, keys, members) in enumerate(rows):
            q, k = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (queries, keys))
            attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
            expected = {
                ClsAttention((0, 1, 2, 3)): spread(attention[:, 0].T, members, 37)[left].T,
                AttentionReceived(layer): spread(attention.mean((0, 1)), members, 37)[left],
                EncoderKeys(layer): spread(keys, members, 37)[left],
            }
            for request, values in expected.items():
                got = seen[request][number]
                got = got[layer, :, : len(left)] if isinstance(request, ClsAttention) else got[: len(left)]
                torch.testing.assert_close(got, values, atol=1e-5, rtol=1e-5)


def test_a_selection_that_does_not_fit_is_an_error():
    class Wrong(Thinning):
        name = "wrong"

        def select(self, tokens):
            return Selection(tokens.valid[:, 1:])

    model = families.shared("llava")
    with vtprune.prune(model, Wrong()), pytest.raises(vtprune.VTPruneError, match="wrong returned a selection"):
        model(**families.batch("llava", model).inputs)
    model(**families.batch("llava", model).inputs)
