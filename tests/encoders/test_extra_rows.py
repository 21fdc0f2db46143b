# SPDX-License-Identifier: Apache-2.0
"""Methods that let the attention of layers read one row more, against layers that are written out."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vtprune
from vtprune.adapters import find_encoder
from vtprune.methods.in_layers import InLayers
from vtprune.ops.token_reduction import Reduction
from vtprune.testing import families

from . import hosts
from .test_engine import DropLast, untouched
from .test_other_methods import SCALE, Written

SCHEDULE = [3, 0, 2, 4]
ASKED: list[int] = []
"""Layers that were asked for a row."""
SEEN: list[torch.Tensor] = []
"""What the method was told of the attention of each layer that merges: (images, heads, tokens, tokens + 1)."""


def row_for(layer, hidden):
    """(batch, tokens, dim) -> (batch, dim)"""
    return hidden.mean(1) * 0.5 + (layer + 1) * hidden[:, -1]


def merge_last(hidden, remove, sizes):
    """The last tokens become a part of the one before them."""
    images, tokens = hidden.shape[:2]
    into = torch.arange(tokens).clamp(max=tokens - remove - 1).expand(images, -1)
    return Reduction.mean(into, tokens - remove, sizes)


@dataclass(frozen=True, kw_only=True)
class Extended(InLayers):
    """Merges the last tokens, with attention to one row more."""

    name: ClassVar[str] = "extended"
    signal: ClassVar[str] = "nothing"
    needs_budget: ClassVar[bool] = False
    reads: ClassVar = ("queries", "keys")

    place: Literal["before", "between", "behind"] = "between"

    @property
    def biases(self):
        return True

    def schedule(self, layers, patches, protected):
        return SCHEDULE[:layers]

    def extra_row(self, layer, hidden):
        ASKED.append(layer)
        return row_for(layer, hidden)

    def reduce(self, tokens):
        SEEN.append(tokens.attention())
        torch.testing.assert_close(tokens.attention(queries=2), SEEN[-1][:, :, :2])
        return merge_last(tokens.hidden, tokens.remove, tokens.sizes)


@dataclass(frozen=True, kw_only=True)
class DropLastExtended(DropLast):
    name: ClassVar[str] = "drop_last_extended"

    def extra_row(self, layer, hidden):
        return row_for(layer, hidden)


@pytest.mark.parametrize(("name", "place"), [*((name, "between") for name in hosts.NAMES), ("vit", "behind")])
@torch.no_grad()
def test_all_tokens_attend_to_the_row_and_it_has_no_output(name, place):
    written, image = Written(name), iter(range(2))

    def run():
        number, seen = next(image), iter(SEEN)
        for layer, remove in zip(written.layers, SCHEDULE, strict=True):
            x, index = written.x, written.layers.index(layer)
            read = torch.cat([x, row_for(index, x[None])]) if remove else x
            q, k, v = layer.qkv(layer.norm(read))
            sizes = torch.ones(len(read))
            sizes[: len(x)] = 1 if written.sizes is None else written.sizes[0]
            weights = (q @ k.transpose(1, 2) * SCALE + sizes.log()).softmax(-1)
            written.attend(layer, weights[:, : len(x)], v)
            if remove:
                torch.testing.assert_close(next(seen)[number], weights[:, : len(x)], rtol=1e-4, atol=1e-5)
            if remove and place == "between":
                written.reduce(merge_last(written.x[None], remove, written.sizes))
            written.x = written.x + layer.mlp(written.x)
            if remove and place == "behind":
                written.reduce(merge_last(written.x[None], remove, written.sizes))

    SEEN.clear()
    ASKED.clear()
    report = written.check(Extended(place=place), run, spread=True)
    assert report.counts == (33, 33, 31, 27) and ASKED == [0, 2, 3] and len(SEEN) == 3
    first = hosts.PATCHES + written.protected
    assert report.entered == (first + 1, first - 3, first - 2, first - 4)


@pytest.mark.parametrize("name", ["clip", "vit"])
@torch.no_grad()
def test_eager_attention_reads_the_row_like_sdpa(name):
    model, outputs = hosts.make(name), []
    for back_end in ("sdpa", "eager"):
        model.set_attn_implementation(back_end)
        with vtprune.prune(model, Extended()):
            outputs.append(hosts.encode(model, hosts.pixels())["pooler_output"])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_mask_that_hides_nothing_fits():
    model, images = hosts.make("timm"), hosts.pixels()
    with vtprune.prune(model, Extended()):
        expected = model(images)
        torch.testing.assert_close(model(images, attn_mask=torch.zeros(37, 37)), expected)


@pytest.mark.parametrize("name", ["clip", "timm-options", "open_clip-norms"])
@torch.no_grad()
def test_the_row_counts_in_the_flops(name):
    model, images = hosts.make(name), hosts.pixels()
    encoder = find_encoder(model)
    flops = []
    for method in (DropLast, DropLastExtended):
        with (
            vtprune.prune(model, method(keep_ratio=0.4)) as session,
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            hosts.encode(model, images)
        counts, tower = counter.get_flop_counts(), type(encoder.tower).__name__
        names = {module: name for name, module in encoder.tower.named_modules()}
        parts = [encoder.patch_embedding, *encoder.layers]
        flops.append(session.report.encoder_flops)
        assert flops[-1] == sum(sum(counts[f"{tower}.{names[part]}"].values()) for part in parts)
    assert flops[1] > flops[0]


@torch.no_grad()
def test_in_a_vision_language_model():
    """Up to the layer that the projector reads, the tower's rows are those of the tower alone."""
    model = families.build("llava").eval()
    inputs = families.batch("llava", model).inputs
    tower, last = vtprune.adapter_for(model).vision_tower(), vtprune.adapter_for(model).shape.feature_layer
    outputs = []
    handle = find_encoder(tower).layers[last].register_forward_hook(lambda module, args, output: outputs.append(output))
    with vtprune.prune(model, Extended()):
        model(**inputs)
    with vtprune.prune(tower, Extended()) as session:
        tower(inputs["pixel_values"])
    handle.remove()
    in_model, alone = outputs
    rows = session.report.left[last]
    assert rows == alone.shape[1] == in_model.shape[1] - 5
    torch.testing.assert_close(in_model[:, :rows], alone[:, :rows], rtol=1e-5, atol=1e-5)


def test_a_method_that_acts_before_layers_cannot_have_one():
    model = hosts.make("clip")
    with pytest.raises(vtprune.UnsupportedStageError, match="extended acts before layers, and has an extra row"):
        vtprune.prune(model, Extended(place="before"))
    assert untouched(model)
