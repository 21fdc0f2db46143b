# SPDX-License-Identifier: Apache-2.0
"""Methods inside encoder layers in vision-language models, against a tower that is written out and a cut before the
language model that other tests check."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vtprune
from vtprune.testing import families
from vtprune.tokens import Selection

from . import reference

FAMILIES = ["llava", "llava_next", "llava_onevision", "video_llava", "paligemma"]
FIRST: list[list[int]] = []
"""A crop each: the patches that are the first of their row."""


@dataclass(frozen=True, kw_only=True)
class KeepFirst(vtprune.BeforeLLM):
    """Keeps the patches in `FIRST`."""

    name: ClassVar[str] = "keep_first"
    signal: ClassVar[str] = "-"
    needs_budget: ClassVar[bool] = False

    def select(self, tokens):
        keep = torch.zeros_like(tokens.valid)
        for crop, places in enumerate(FIRST):
            keep[crop, places] = True
        return Selection(keep)


def encode(model, inputs):
    """What the base model is given for the images of a prompt."""
    names = ("pixel_values", "pixel_values_images", "image_sizes", "batch_num_images")
    output = model.base_model.get_image_features(**{name: inputs[name] for name in names if name in inputs})
    pooled = output.pooler_output
    return pooled if torch.is_tensor(pooled) else torch.cat([x.flatten(0, -2) for x in pooled])


def merged_by_hand(model, inputs, r):
    """A hook on a model that gives its projector the tower's tokens as `reference` merges them, and the images."""
    adapter, entering = vtprune.adapter_for(model), []
    layers = list(adapter.encoder_layers("image"))
    handle = layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: entering.append(args[0]), with_kwargs=True
    )
    encode(model, inputs)
    handle.remove()
    last = adapter.shape.feature_layer
    attention = adapter.encoder_attention(layers[0])
    written = reference.layers_of(layers[: last + 1])
    prefix, scale = int(adapter.shape.has_cls), attention.head_dim**-0.5
    images = [reference.run(written, crop, [r] * (last + 1), prefix, scale) for crop in entering[0]]
    whole = torch.stack([image.spread() for image in images])
    return layers[last].register_forward_hook(lambda module, args, output: whole, prepend=True), images


def generated(model, inputs):
    options = {"suppress_tokens": [families.IMAGE, families.VIDEO], "do_sample": False, "max_new_tokens": 5}
    output = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_projector_gets_what_merged(name):
    model = families.build(name).eval()
    inputs = families.batch(name, model).inputs
    handle, images = merged_by_hand(model, inputs, 2)
    expected = encode(model, inputs)
    handle.remove()
    plain = encode(model, inputs)
    with vtprune.prune(model, "tome", r=2) as session:
        torch.testing.assert_close(encode(model, inputs), expected, rtol=1e-5, atol=1e-5)
        model(**inputs)
    report = session.report
    assert images[0].lengths[-1] < images[0].lengths[0]
    assert sum(report.final_tokens) < sum(report.original_tokens)
    assert report.encoder_flops < unpruned_flops(model, inputs)
    assert torch.equal(encode(model, inputs), plain)


def unpruned_flops(model, inputs):
    """FLOPs of the encoder of the whole batch, nothing merged."""
    with vtprune.prune(model, "tome", r=0) as session:
        model(**inputs)
    assert session.report.keep_ratio == 1.0
    return session.report.encoder_flops


@pytest.mark.parametrize("name", ["llava", "paligemma"])
@pytest.mark.parametrize("inside", [[], ["transprune"]], ids=["alone", "transprune"])
@torch.no_grad()
def test_generation_is_that_of_the_merged_tokens(name, inside):
    model = families.build(name).eval()
    inputs = families.batch(name, model).inputs
    more = [{"name": method, "keep_ratio": 0.6} for method in inside]
    with vtprune.prune(model, [{"name": "tome", "r": 2}, *more]) as session:
        ids, logits = generated(model, inputs)
    handle, images = merged_by_hand(model, inputs, 2)
    prefix = int(vtprune.adapter_for(model).shape.has_cls)
    FIRST[:] = [sorted(min(row) - prefix for row in image.members[prefix:]) for image in images]
    with vtprune.prune(model, [KeepFirst(), *more]) as by_hand:
        expected_ids, expected = generated(model, inputs)
    handle.remove()
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(session.report.counts, by_hand.report.counts)
    assert session.report.counts[:, 0].sum() == sum(len(places) for places in FIRST)
    assert (session.report.counts[:, -1] < session.report.counts[:, 0]).all() == bool(inside)


@pytest.mark.parametrize("method", ["tome", "mctf", "zero_tprune", "tca", "auroracap", "random_patches"])
@torch.no_grad()
def test_budgets_batches_and_nothing_to_do(method):
    model = families.build("llava").eval()
    batch = families.batch("llava", model)
    plain = model(**batch.inputs).logits
    with vtprune.prune(model, method, keep_ratio=1.0):
        assert torch.equal(model(**batch.inputs).logits, plain)
    with vtprune.prune(model, method, keep_ratio=0.5) as session:
        together = model(**batch.inputs).logits
        report = session.report
        for sample, single in enumerate(batch.singles):
            alone = model(**single).logits
            torch.testing.assert_close(together[sample, -1], alone[0, -1], rtol=1e-4, atol=1e-4)
    share = report.keep_ratio
    assert share == 0.5 or (method == "tca" and 0.1 < share < 0.5)
    assert torch.equal(model(**batch.inputs).logits, plain)


@pytest.mark.parametrize(("name", "media"), [("gemma3", "image"), ("llava_onevision", "video")])
@torch.no_grad()
def test_visual_tokens_of_several_patches(name, media):
    """Merging leaves all of them, made of what merged; a mean of patches that were dropped would be wrong."""
    model = families.build(name).eval()
    inputs = families.batch(name, model, media=media).inputs
    flops = unpruned_flops(model, inputs)
    with vtprune.prune(model, "tome", keep_ratio=0.5) as session:
        model(**inputs)
    assert session.report.keep_ratio == 1.0 and session.report.encoder_flops < flops
    with (
        pytest.raises(vtprune.UnsupportedStageError, match="zero_tprune drops patches"),
        vtprune.prune(model, "zero_tprune", keep_ratio=0.5),
    ):
        model(**inputs)


def test_what_cannot_be_is_refused_when_the_session_is_made():
    model = families.shared("llava")
    for other in ("vtc_cls", "visionzip", "mustdrop"):
        with pytest.raises(vtprune.UnsupportedStageError, match="no other method can read or merge there"):
            vtprune.prune(model, [{"name": "tome", "r": 1}, {"name": other, "keep_ratio": 0.5}])
    with pytest.raises(vtprune.ConfigError, match="only one method"):
        vtprune.prune(model, [{"name": "tome", "r": 1}, {"name": "tome", "r": 1}])
    with pytest.raises(vtprune.UnsupportedStageError, match="tca reads the attention of a CLS token"):
        vtprune.prune(families.shared("paligemma"), "tca")
    for name, reason in (("qwen2_vl", "packed or masked"), ("internvl", "its vision tower is a InternVLVisionModel")):
        with pytest.raises(vtprune.UnsupportedStageError, match=reason):
            vtprune.prune(families.shared(name), "tome", r=1)
