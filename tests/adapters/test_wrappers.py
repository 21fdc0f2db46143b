# SPDX-License-Identifier: Apache-2.0
"""Models inside wrappers are pruned like the model itself, or refused with a message that says what to pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conformance import models
from conformance.models import batch_of_three
from conformance.processors import processor
from conformance.reference import generate
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

import vtprune
from vtprune.errors import UnsupportedModelError
from vtprune.testing import families

METHODS = ("divprune", "fastv", "vtc_cls")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def check(wrapper, model, call):
    """A session on the wrapper gives the same as one on the model."""
    for method in METHODS:
        with vtprune.prune(model, method, keep_ratio=0.5) as session:
            expected, own = call(model), session.report
        with vtprune.prune(wrapper, method, keep_ratio=0.5) as session:
            got = call(wrapper)
        assert torch.equal(got, expected)
        assert session.report.counts.tolist() == own.counts.tolist()
        assert not torch.equal(call(wrapper), got)  # and the session is off


@pytest.mark.parametrize("name, mixed", [("llava", False), ("llava", True), ("qwen2_5_vl", False), ("internvl", False)])
def test_peft(name, mixed):
    peft = pytest.importorskip("peft")
    model = families.build(name)
    batch = families.batch(name, model)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    wrapper = peft.get_peft_model(model, config, mixed=mixed).eval()
    for method in ("divprune", "fastv"):
        with vtprune.prune(wrapper, method, keep_ratio=0.5) as session:
            logits = wrapper(**batch.inputs).logits
            kept = [session.report.kept(0, layer).tolist() for layer in range(session.report.depth)]
        merged = peft.get_peft_model(families.build(name), config, mixed=mixed).eval()
        merged.load_state_dict(wrapper.state_dict())
        merged = merged.merge_and_unload()
        with vtprune.prune(merged, method, keep_ratio=0.5) as session:
            expected = merged(**batch.inputs).logits
            assert kept == [session.report.kept(0, layer).tolist() for layer in range(session.report.depth)]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        assert not torch.allclose(wrapper(**batch.inputs).logits, logits, atol=1e-3)


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = models.build("gqa")
        inputs = batch_of_three(model).inputs()
        check(nn.parallel.DistributedDataParallel(model), model, lambda m: m(**inputs).logits)
    finally:
        torch.distributed.destroy_process_group()


def test_a_pipeline_like_object_is_asked_for_its_model():
    class Pipeline:
        def __init__(self, model):
            self.model = model

        def __call__(self):
            return torch.stack(generate(self.model, inputs).logits)

    model = models.build("gqa")
    inputs = batch_of_three(model).inputs()
    check(Pipeline(model), model, lambda m: m() if isinstance(m, Pipeline) else Pipeline(m)())


def test_data_parallel_is_refused_with_what_to_pass():
    with pytest.raises(UnsupportedModelError, match=r"pass model\.module and use one device"):
        vtprune.prune(nn.DataParallel(models.build("gqa")), "divprune", keep_ratio=0.5)


@pytest.mark.parametrize(
    "thing, told",
    [
        ("org/name", r"'org/name' is a name, not a model; load it: .*from_pretrained\(\"org/name\"\)"),
        (Path("folder"), "'folder' is a name, not a model; load it"),
        (LlavaForConditionalGeneration, r"is a class, not a model; load one: LlavaForConditionalGeneration\.from_pre"),
        (processor("llava"), "a LlavaProcessor makes a model's inputs and holds no model; pass the model itself"),
        (processor("llava").tokenizer, "makes a model's inputs and holds no model; pass the model itself"),
        (processor("llava").image_processor, "a CLIPImageProcessor.* is not a model; pass the model"),
        (LlavaConfig(), "a LlavaConfig is not a model; pass the model"),
        (None, "a NoneType is not a model; pass the model"),
    ],
    ids=["str", "Path", "class", "processor", "tokenizer", "image processor", "config", "None"],
)
def test_what_is_no_model_is_told_what_to_pass(thing, told):
    for find in (vtprune.adapter_for, lambda thing: vtprune.prune(thing, "divprune", keep_ratio=0.5)):
        with pytest.raises(UnsupportedModelError, match=told):
            find(thing)


def test_a_module_with_the_config_alone_is_refused():
    class Own(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner, self.config = model, model.config

    with pytest.raises(UnsupportedModelError, match="a Own has the config of LLaVA-1.5, but not its parts"):
        vtprune.prune(Own(models.build("gqa")), "divprune", keep_ratio=0.5)


def test_a_compiled_module_is_refused():
    model = models.build("gqa")
    with pytest.raises(UnsupportedModelError, match="prune the uncompiled model"):
        vtprune.prune(torch.compile(model, backend="eager"), "divprune", keep_ratio=0.5)
