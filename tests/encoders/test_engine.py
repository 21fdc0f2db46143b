# SPDX-License-Identifier: Apache-2.0
"""Tokens that are dropped inside layers, what is counted, and what is refused."""

import copy
import json
import threading
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vtprune
from vtprune.adapters import find_encoder
from vtprune.methods.in_layers import InLayers, equal_steps
from vtprune.ops.token_reduction import Reduction
from vtprune.testing import families

from . import hosts


@dataclass(frozen=True, kw_only=True)
class DropLast(InLayers):
    """Drops the last tokens."""

    name: ClassVar[str] = "drop_last"
    signal: ClassVar[str] = "nothing"
    place = "between"
    drops = True

    def schedule(self, layers, patches, protected):
        return equal_steps(self.name, layers, patches, self.patches_left(patches))

    def reduce(self, tokens):
        images, length = tokens.hidden.shape[:2]
        return Reduction.gather(torch.arange(length - tokens.remove).expand(images, -1), length)


@pytest.mark.parametrize("name", hosts.NAMES)
@torch.no_grad()
def test_dropped_tokens_are_seen_by_nothing_behind_them(name):
    """The same as layers whose output is cut by hand."""
    model, images = hosts.make(name), hosts.pixels()
    encoder = find_encoder(model)
    prefix, layers, outputs = encoder.prefix_tokens, list(encoder.layers), []
    handle = layers[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
    with vtprune.prune(model, DropLast(keep_tokens=hosts.PATCHES - 10)) as session:
        pruned = hosts.encode(model, images)
    handle.remove()
    assert session.report.counts == (33, 30, 28, 26)
    assert session.report.sources(1).tolist() == [*range(prefix + 26), *[-1] * 10]
    assert outputs[0].shape[1] == prefix + 26

    # An MLP sees every token by itself, so it makes no difference that here it runs before the cut.
    handles = [
        layer.register_forward_hook(lambda module, args, output, left=prefix + left: output[:, :left])
        for layer, left in zip(layers, session.report.counts, strict=True)
    ]
    expected = hosts.encode(model, images)
    for handle in handles:
        handle.remove()
    for key, value in expected.items():
        torch.testing.assert_close(pruned[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "dinov2-swiglu", "timm-options", "timm-mean", "open_clip-norms"])
@torch.no_grad()
def test_flops_are_those_that_torch_counts(name):
    model, images = hosts.make(name), hosts.pixels()
    encoder = find_encoder(model)
    with (
        vtprune.prune(model, DropLast(keep_ratio=0.4)) as session,
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        hosts.encode(model, images)
    counts = counter.get_flop_counts()
    prefix = type(encoder.tower).__name__
    names = {module: name for name, module in encoder.tower.named_modules()}
    parts = [encoder.patch_embedding, *encoder.layers]
    counted = sum(sum(counts[f"{prefix}.{names[part]}"].values()) for part in parts)
    assert session.report.encoder_flops == counted < session.report.unpruned_encoder_flops


@torch.no_grad()
def test_the_report():
    model = hosts.shared("dinov2-registers")
    with vtprune.prune(model, "tome", keep_tokens=9) as session:
        assert session.report is None
        hosts.encode(model, hosts.pixels())
    report = session.report
    data = json.loads(json.dumps(report.to_dict()))
    assert data["model"] == "Dinov2WithRegistersModel" and data["methods"] == ["tome"] and data["images"] == 2
    assert data["counts"] == list(report.counts) and report.counts[-1] == report.final_tokens == 9
    assert data["prefix_tokens"] == 4 and data["original_tokens"] == 36 and data["keep_ratio"] == 0.25
    assert [len(sources) for sources in data["sources"]] == [40, 40] and max(data["sources"][0]) == 12
    lines = str(report).splitlines()
    assert "tome on Dinov2WithRegistersModel: 2 image(s), 4 encoder layers" in lines[0]
    assert lines[2].split()[-3:] == ["36", "9", "25.0%"]
    assert "29, 22, 15, 9" in lines[-1]
    with pytest.raises(IndexError, match="2 images"):
        report.sources(2)


@torch.no_grad()
def test_totals_add_all_batches_up():
    model, images = hosts.make(hosts.NAMES[0]), hosts.pixels()
    with vtprune.prune(model, DropLast(keep_tokens=hosts.PATCHES - 10)) as session:
        assert session.totals.batches == 0 and session.totals.keep_ratio == 1.0
        hosts.encode(model, images)
        first = session.report
        hosts.encode(model, images[:1])
        last = session.report
    totals = session.totals
    assert (totals.batches, totals.images) == (2, len(images) + 1)
    assert totals.original_tokens == totals.images * hosts.PATCHES
    assert totals.final_tokens == totals.images * (hosts.PATCHES - 10)
    assert totals.encoder_flops == first.encoder_flops + last.encoder_flops
    assert totals.unpruned_encoder_flops == first.unpruned_encoder_flops + last.unpruned_encoder_flops
    assert totals.encoder_flops < totals.unpruned_encoder_flops
    assert str(totals) in repr(session)


def test_gradients_are_those_of_what_is_computed():
    """A small step along the gradient of a parameter changes the output by what the gradient says."""
    model, images = hosts.make("vit").double(), hosts.pixels().double()
    weight = model.layers[1].mlp.fc1.weight
    with vtprune.prune(model, "tome", r=5):
        value = model(images).pooler_output.square().sum()
        value.backward()
        gradient, step = weight.grad, 1e-5
        with torch.no_grad():
            weight.add_(step * gradient)
            above = model(images).pooler_output.square().sum()
            weight.sub_(2 * step * gradient)
            below = model(images).pooler_output.square().sum()
    torch.testing.assert_close((above - below) / (2 * step), gradient.square().sum(), rtol=1e-3, atol=0)


@torch.no_grad()
def test_autocast():
    model, images = hosts.make("timm-options"), hosts.pixels()
    with vtprune.prune(model, "tome", r=3):
        whole = hosts.encode(model, images)["output"]
        with torch.autocast("cpu", torch.bfloat16):
            half = hosts.encode(model, images)["output"]
    torch.testing.assert_close(half.float(), whole, rtol=0.1, atol=0.1)


@torch.no_grad()
def test_other_ways_into_an_encoder_are_pruned_too():
    timm, images = hosts.make("timm"), hosts.pixels()
    with vtprune.prune(timm, "tome", r=5) as session:
        features = timm.forward_features(images)
        assert session.report.final_tokens == hosts.PATCHES - 20
        torch.testing.assert_close(timm.forward_head(features), timm(images))
        # The layers before the last one put out what is left of the image.
        lengths = [x.shape[1] for x in timm.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)]
    assert lengths == [31, 26, 21, 36]
    clip = hosts.make("clip")
    with vtprune.prune(clip, "tome", r=5):
        output = clip(images, output_hidden_states=True)
    assert [x.shape[1] for x in output.hidden_states] == [37, 32, 27, 22, 37]


@torch.no_grad()
def test_threads_have_their_own_reports():
    model, reports = hosts.make("siglip"), {}

    def work(images):
        for _ in range(3):
            hosts.encode(model, hosts.pixels(images))
        reports[images] = session.report

    with vtprune.prune(model, "tome", r=4) as session:
        threads = [threading.Thread(target=work, args=(images,)) for images in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {images: report.images for images, report in reports.items()} == {1: 1, 2: 2, 3: 3}


# -- refused -----------------------------------------------------------------------------------------------------------


def untouched(model):
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("method", "options", "error", "words"),
    [
        ("fastv", {"keep_ratio": 0.5}, vtprune.UnsupportedStageError, "fastv does not act inside the layers"),
        ("mmtok", {"keep_ratio": 0.5}, vtprune.UnsupportedStageError, "encoder alone"),
        ("mustdrop", {"keep_ratio": 0.5}, vtprune.UnsupportedStageError, "mustdrop"),
        ("tome", {}, vtprune.BudgetError, "needs a budget"),
        ("tome", {"r": 3, "keep_ratio": 0.5}, vtprune.BudgetError, "one of r, keep_ratio and keep_tokens"),
        ("tome", {"keep_tokens": 0}, vtprune.BudgetError, "would leave no patches"),
        ("tome", {"r": [1, 1, 1, 1, 1]}, vtprune.VTPruneError, "at most 4"),
        ("tome", {"r": (3, 2.0)}, vtprune.VTPruneError, "inflect"),
        ("tome", {"r": -1}, vtprune.ConfigError, "r=-1"),
        ("tome", {"r": 3, "track_size": False}, vtprune.ConfigError, "prop_attn=False"),
        ("tome", {"variant": "kth", "r": 3}, vtprune.BudgetError, "takes k and layers"),
        ("tome", {"variant": "kth", "layers": [4]}, vtprune.ConfigError, "layers 0..3"),
        ("tome", {"r": 3, "layers": [1]}, vtprune.ConfigError, "layers is for"),
        ("tome", {"r": 3, "text": "what is it?"}, vtprune.ConfigError, "text: only for vision-language models"),
        (["tome", "tome"], {}, vtprune.ConfigError, "only one method"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(method, options, error, words):
    model = hosts.make("clip")
    with pytest.raises(error, match=words):
        vtprune.prune(model, method, **options)
    assert untouched(model)


@torch.no_grad()
def test_budgets_that_an_image_cannot_meet():
    model, images = hosts.make("timm"), hosts.pixels()
    with vtprune.prune(model, "tome", keep_tokens=37), pytest.raises(vtprune.BudgetError, match="it has 36 patches"):
        hosts.encode(model, images)
    with vtprune.prune(model, "tome", keep_tokens=2), pytest.raises(vtprune.BudgetError, match="at least 3 are left"):
        hosts.encode(model, images)
    with (
        vtprune.prune(model, "tome", keep_ratio=0.99),
        pytest.raises(vtprune.NothingPrunedError, match="36 patches came"),
    ):
        hosts.encode(model, images)
    with vtprune.prune(model, "tome", keep_ratio=0.99, strict=False) as session:
        hosts.encode(model, images)
    assert session.report.keep_ratio == 1.0
    assert untouched(model)


def test_masks_and_checkpointing_are_refused_where_they_would_go_wrong():
    vit, images = hosts.make("vit"), hosts.pixels()
    mask = torch.ones(2, hosts.PATCHES + 1, dtype=torch.long)
    mask[0, -1] = 0
    with vtprune.prune(vit, "tome", r=2), pytest.raises(vtprune.UnsupportedStageError, match="attention mask"):
        vit(images, attention_mask=mask)
    timm = hosts.make("timm")
    with vtprune.prune(timm, "tome", r=2), pytest.raises(vtprune.UnsupportedStageError, match="attention mask"):
        timm(images, attn_mask=torch.zeros(37, 37).fill_diagonal_(-1.0))
    getattr(vit, "activation_checkpointing_enable", vit.gradient_checkpointing_enable)()
    vit.train()
    with vtprune.prune(vit, "tome", r=2), pytest.raises(vtprune.UnsupportedStageError, match="checkpointing"):
        vit(images)
    with vtprune.prune(vit, "tome", r=0):
        vit(images)


def test_a_back_end_without_a_bias_is_refused():
    model = hosts.make("clip")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(vtprune.UnsupportedStageError, match="'flash_attention_2' takes no bias"):
        vtprune.prune(model, "tome", r=3)
    vtprune.prune(model, "tome", r=3, prop_attn=False)


def test_one_session_at_a_time_and_no_copies_of_it():
    model = hosts.make("clip-model")
    with vtprune.prune(model, "tome", r=3) as session:
        with pytest.raises(vtprune.VTPruneError, match="active on this model already"):
            vtprune.patch(model.vision_model, "tome", r=3)
        with pytest.raises(vtprune.VTPruneError, match="entered already"), session:
            pass
        with pytest.raises(vtprune.VTPruneError, match="cannot be copied"):
            copy.deepcopy(model)
        hosts.encode(model, hosts.pixels())
    assert untouched(model)
    with pytest.warns(UserWarning, match="no call of the model reached"), session:
        pass


@torch.no_grad()
def test_compiled_before_and_within_a_session():
    model, images = hosts.make("timm"), hosts.pixels()
    with pytest.raises(vtprune.UnsupportedModelError, match="compiled"):
        vtprune.prune(torch.compile(model, backend="eager"), "tome", r=3)
    with vtprune.prune(model, "tome", r=3) as session:
        expected = hosts.encode(model, images)
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(images), expected["output"])
        assert session.report.final_tokens == hosts.PATCHES - 12
    torch.compiler.reset()


def test_a_tower_has_one_session_with_its_language_model():
    model = families.build("llava")
    tower = vtprune.adapter_for(model).vision_tower()
    with (
        vtprune.prune(tower, "tome", r=1, strict=False),
        pytest.raises(vtprune.VTPruneError, match="active on this model already"),
        vtprune.prune(model, "mmtok", keep_ratio=0.5),
    ):
        pass
    with (
        vtprune.prune(model, "mmtok", keep_ratio=0.5, strict=False),
        pytest.raises(vtprune.VTPruneError, match="active on this model already"),
        vtprune.prune(tower, "tome", r=1),
    ):
        pass
    assert untouched(model)


def test_what_is_no_known_encoder():
    with pytest.raises(vtprune.UnsupportedModelError, match="VisionTransformer of timm"):
        vtprune.prune(nn.Linear(2, 2), "tome", r=1)
    import timm

    parallel = timm.models.vision_transformer.VisionTransformer(
        img_size=8,
        patch_size=4,
        embed_dim=8,
        depth=1,
        num_heads=2,
        block_fn=timm.models.vision_transformer.ParallelScalingBlock,
    )
    with pytest.raises(vtprune.UnsupportedModelError, match="ParallelScalingBlock"):
        vtprune.prune(parallel, "tome", r=1)


@torch.no_grad()
def test_an_error_on_the_way_leaves_nothing_behind():
    model, images = hosts.make("clip"), hosts.pixels()
    layer = model.encoder.layers[2]

    def fail(module, args):
        raise RuntimeError("on the way")

    with vtprune.prune(model, "tome", r=3) as session:
        handle = layer.mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on the way"):
            hosts.encode(model, images)
        handle.remove()
        expected = hosts.encode(model, images)
        assert session.report.final_tokens == hosts.PATCHES - 12
    with vtprune.prune(model, "tome", r=3):
        assert torch.equal(hosts.encode(model, images)["last_hidden_state"], expected["last_hidden_state"])
