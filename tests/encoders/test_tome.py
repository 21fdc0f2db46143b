# SPDX-License-Identifier: Apache-2.0
"""Token merging inside every supported vision encoder, against the same written out."""

import pytest
import torch

import vtprune
from vtprune.adapters import find_encoder

from . import hosts, reference

R = [5, 7, 0, 6]


def entering(model, images):
    """(images, tokens, dim): what enters the first layer."""
    seen = []
    layer = find_encoder(model).layers[0]
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    hosts.encode(model, images)
    handle.remove()
    return seen[0]


def written_out(model, images, r, **options):
    """The images behind the last layer, as `reference` computes them."""
    adapter = find_encoder(model)
    layers = reference.layers_of(list(adapter.layers))
    scale = (hosts.WIDTH // hosts.HEADS) ** -0.5
    return [
        reference.run(layers, image, r, adapter.prefix_tokens, scale, **options) for image in entering(model, images)
    ]


def last_layer(model):
    """A list that gets the output of the last layer, as the model sees it, and what ends this."""
    seen = []
    handle = find_encoder(model).layers[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    return seen, handle


@pytest.mark.parametrize("name", hosts.NAMES)
@torch.no_grad()
def test_it_computes_what_the_reference_does(name):
    model, images = hosts.shared(name), hosts.pixels()
    expected = written_out(model, images, R)
    seen, handle = last_layer(model)
    with vtprune.prune(model, "tome", r=R) as session:
        outputs = hosts.encode(model, images)
    handle.remove()
    report = session.report
    assert list(report.left) == expected[0].lengths
    assert report.final_tokens == hosts.PATCHES - sum(R)
    output, pooled = reference.output_of(name)
    for index, image in enumerate(expected):
        members = [(report.sources(index) == row).nonzero()[:, 0].tolist() for row in range(len(image.rows))]
        assert members == [sorted(group) for group in image.members]
        torch.testing.assert_close(seen[0][index], image.spread(), rtol=1e-5, atol=1e-5)
        wanted = pooled(model, image.rows, image.sizes)
        torch.testing.assert_close(outputs[output][index], wanted.view_as(outputs[output][index]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", hosts.NAMES)
@torch.no_grad()
def test_merging_nothing_is_bit_identical(name, dtype):
    model, images = hosts.make(name).to(dtype), hosts.pixels().to(dtype)
    plain = hosts.encode(model, images)
    for budget in ({"r": 0}, {"keep_ratio": 1.0}, {"keep_tokens": hosts.PATCHES}):
        with vtprune.prune(model, "tome", **budget) as session:
            merged = hosts.encode(model, images)
        assert all(torch.equal(value, merged[key]) for key, value in plain.items())
        assert session.report.keep_ratio == 1.0
        assert session.report.encoder_flops == session.report.unpruned_encoder_flops


@pytest.mark.parametrize("name", hosts.NAMES)
@torch.no_grad()
def test_a_batch_gives_each_image_what_it_gets_alone_and_removal_restores(name):
    model, images = hosts.make(name), hosts.pixels(3)
    hooks = {id(m): [dict(h) for h in (m._forward_hooks, m._forward_pre_hooks)] for m in model.modules()}
    plain = hosts.encode(model, images)
    session = vtprune.patch(model, "tome", r=6)
    together = hosts.encode(model, images)
    alone = [hosts.encode(model, image[None]) for image in images]
    session.remove()
    for key, value in together.items():
        torch.testing.assert_close(value, torch.cat([single[key] for single in alone]), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(value, plain[key], atol=1e-3)
    after = hosts.encode(model, images)
    assert all(torch.equal(value, after[key]) for key, value in plain.items())
    assert hooks == {id(m): [dict(h) for h in (m._forward_hooks, m._forward_pre_hooks)] for m in model.modules()}


@pytest.mark.parametrize("name", ["clip", "siglip", "vit", "dinov2-registers"])
@torch.no_grad()
def test_eager_attention_is_biased_like_sdpa(name):
    model, images = hosts.make(name), hosts.pixels()
    outputs = []
    for back_end in ("sdpa", "eager"):
        model.set_attn_implementation(back_end)
        with vtprune.prune(model, "tome", r=R):
            outputs.append(hosts.encode(model, images)["pooler_output"])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "timm", "open_clip", "open_clip-norms"])
@torch.no_grad()
def test_without_proportional_attention(name):
    model, images = hosts.shared(name), hosts.pixels()
    expected = written_out(model, images, R, proportional=False)
    seen, handle = last_layer(model)
    with vtprune.prune(model, "tome", r=R, prop_attn=False):
        hosts.encode(model, images)
    handle.remove()
    for found, image in zip(seen[0], expected, strict=True):
        torch.testing.assert_close(found, image.spread(), rtol=1e-5, atol=1e-5)
