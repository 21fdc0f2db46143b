# SPDX-License-Identifier: Apache-2.0
"""Every multimodal class of the installed transformers has an adapter, or a refusal that says why."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers as hf

import vtprune
from vtprune import adapters
from vtprune.adapters import list_adapters
from vtprune.adapters.coverage import coverage
from vtprune.adapters.llava import Llava
from vtprune.adapters.refusals import NO_ADAPTER, REFUSALS, Refusal
from vtprune.testing import families
from vtprune.transformers_private.release import NEWEST, version

pytestmark = pytest.mark.release


def refused(model) -> str:
    with pytest.raises(vtprune.UnsupportedModelError) as caught:
        vtprune.prune(model, "divprune", keep_ratio=0.5)
    return str(caught.value)


def test_every_class_has_an_adapter_or_a_reason():
    rows = coverage()
    assert len(rows) > 100
    unseen = {row.model_type: row.class_name for row in rows if (row.adapter is None) == (row.refusal is None)}
    assert not unseen, "neither adapted nor refused: add an adapter, or a line in adapters/refusals.py"


def test_the_mappings_of_transformers_are_all_walked():
    classes = {row.class_name for row in coverage()}
    assert {"Qwen2VLForConditionalGeneration", "MllamaForConditionalGeneration"} <= classes  # images
    assert {"VoxtralForConditionalGeneration", "Qwen2_5OmniForConditionalGeneration"} <= classes  # sound, too
    assert {"ColPaliForRetrieval", "ColQwen2ForRetrieval"} <= classes  # retrieval, with and without a mapping


def test_no_class_has_an_adapter_and_a_reason():
    own = {name.partition("/")[0] for name, a in list_adapters().items() if a.__module__.startswith("vtprune.adapters")}
    assert not own & REFUSALS.keys(), "supported: delete the line in adapters/refusals.py"


@pytest.mark.skipif(version() != NEWEST, reason="older releases lack classes that have a reason")
def test_every_reason_is_of_a_class_that_there_is():
    assert not REFUSALS.keys() - {row.model_type for row in coverage()}


@pytest.mark.parametrize(
    "name, why, helps",
    [
        ("MllamaForConditionalGeneration", "by cross-attention, so the prompt has no visual tokens", "vtprune models"),
        ("Florence2ForConditionalGeneration", "its image is in an encoder", "vtprune models"),
        (
            "Blip2ForConditionalGeneration",
            "so few tokens of an image that little is left to prune (32 an",
            "take a fam",
        ),
        ("GitForCausalLM", "where its visual tokens are (they are put before the text", "take a family"),
        ("VoxtralForConditionalGeneration", "it reads sound and no images", "vtprune models"),
        ("Mistral4ForCausalLM", "it is a language model alone", "pass the whole vision-language model"),
        ("GPT2LMHeadModel", "it is a language model alone", "pass the whole vision-language model"),
    ],
)
def test_the_error_says_why_and_what_would_help(name, why, helps):
    cls = getattr(hf, name)
    with torch.device("meta"):
        model = cls(cls.config_class())
    begin, _, end = refused(model).partition("; ")
    assert begin.startswith(f"a {name} cannot be pruned: ") and why in begin and helps in end


def test_a_class_without_an_adapter_is_told_what_one_must_handle():
    begin, _, end = Refusal(NO_ADAPTER, "an adapter must handle this").message("SomeModel").partition("; ")
    assert "no adapter for it yet (an adapter must handle this)" in begin and "CONTRIBUTING.md" in end


@torch.no_grad()
def test_of_retrieval_the_tower_alone_can_be_pruned():
    host = families.build("paligemma")
    model = hf.ColPaliForRetrieval(hf.ColPaliConfig(vlm_config=host.config, embedding_dim=8)).eval()
    assert "the vectors of its tokens are its output" in refused(model) and "SigLIP tower alone" in refused(model)
    inputs = families.batch("paligemma", host).inputs
    plain = model(**inputs).embeddings
    tower = next(module for module in model.modules() if type(module).__name__ == "SiglipVisionModel")
    with vtprune.prune(tower, "tome", r=2) as session:
        merged = model(**inputs).embeddings
    assert merged.shape == plain.shape and not torch.allclose(merged, plain)
    assert session.report.keep_ratio < 1


def test_an_adapter_of_another_package_goes_before_a_reason(monkeypatch):
    assert "mllama" in REFUSALS
    with torch.device("meta"):
        model = hf.MllamaForConditionalGeneration(hf.MllamaConfig())
    refused(model)

    class Mllama(Llava):
        model_types = ("mllama",)

        @classmethod
        def refuses(cls, config):
            return "it is an example"

    monkeypatch.setitem(adapters._ADAPTERS, "mllama", Mllama)
    assert "it is an example" in refused(model)
    (row,) = (row for row in coverage() if row.model_type == "mllama")
    assert row.adapter is Mllama and row.refusal is None


# -- remote code ------------------------------------------------------------------------------------------------------

MODELLING = """
from transformers import PreTrainedConfig, PreTrainedModel

class OwnConfig(PreTrainedConfig):
    model_type = "{model_type}"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
"""
CONFIG = """{{
  "model_type": "{model_type}",
  "auto_map": {{"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}}
}}"""


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A function that loads a model of a given type, whose classes are in its checkpoint."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def load(model_type: str):
        folder = tmp_path / model_type
        folder.mkdir()
        (folder / "modeling_own.py").write_text(MODELLING.format(model_type=model_type))
        (folder / "config.json").write_text(CONFIG.format(model_type=model_type))
        config = hf.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        return hf.AutoModel.from_config(config, trust_remote_code=True)

    return load


@pytest.mark.parametrize(
    "model_type, helps",
    [
        ("own_vlm", "take a checkpoint that transformers loads without trust_remote_code, or write an adapter"),
        ("qwen3_vl", "take a checkpoint for Qwen3VLForConditionalGeneration of transformers, and load it without"),
        (
            "mllama",
            "has a class of its own for it, but a MllamaForConditionalGeneration cannot be pruned: its image",
        ),
    ],
)
def test_a_model_from_remote_code_is_told_so(remote, model_type, helps):
    message = refused(remote(model_type))
    assert "a OwnModel cannot be pruned: its code comes from the checkpoint's repository (remote code); " in message
    assert helps in message
