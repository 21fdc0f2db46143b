# SPDX-License-Identifier: Apache-2.0
"""What excludes pruning is refused by name, when the server starts or when a request comes in."""

from __future__ import annotations

import importlib.metadata
import logging

import pytest
from transformers import LlamaConfig
from vllm import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import ModelRegistry

import vtprune.serving.vllm as plugin
from vtprune.errors import UnsupportedModelError, UnsupportedStageError

from .checkpoints import save
from .serving import A, Request, engine, serve

METHOD = {"vtprune": {"name": "divprune", "keep_ratio": 0.5}}
OPTIONS = {
    "enable_tower_connector_lora": dict(enable_lora=True, enable_tower_connector_lora=True),
    "compile_mm_encoder": dict(compilation_config={"compile_mm_encoder": True}),
    "cudagraph_mm_encoder": dict(compilation_config={"cudagraph_mm_encoder": True}),
    "mm_encoder_tp_mode='data'": dict(mm_encoder_tp_mode="data", tensor_parallel_size=2),
    "video_pruning_rate": dict(video_pruning_rate=0.5),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_server_that_prunes_by_default_does_not_start(name, folder):
    args = dict(model=str(save("qwen2_5_vl", folder)), dtype="float32", **OPTIONS[name])
    plain = EngineArgs(**args).create_engine_config()
    assert name in plain.model_config.hf_config.vtprune_excluded_by
    with pytest.raises(UnsupportedStageError, match=name):
        EngineArgs(**args, hf_overrides=METHOD).create_engine_config()


def test_without_such_an_option_nothing_is_noted(folder):
    config = EngineArgs(model=str(save("qwen2_5_vl", folder)), dtype="float32").create_engine_config()
    assert not hasattr(config.model_config.hf_config, "vtprune_excluded_by")


@pytest.mark.slow
def test_a_request_is_refused_by_a_server_that_cannot_prune(folder):
    path = save("llava", folder)
    with engine(path, compilation_config={"compile_mm_encoder": True}) as llm:
        with pytest.raises(VLLMValidationError, match="compile_mm_encoder"):
            serve(llm, path.name, [Request("{image} who is this ?", [A], METHOD["vtprune"])])
        (answer,) = serve(llm, path.name, [Request("{image} who is this ?", [A])])
        assert answer.tokens


def test_an_unknown_release_of_vllm_gets_a_warning_and_nothing_else(monkeypatch, caplog):
    before = dict(ModelRegistry.models), dict(MODELS_CONFIG_MAP)
    monkeypatch.setattr(plugin, "ORIGINALS", {})
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.33.1")
    monkeypatch.setattr(plugin.logger, "propagate", True)
    with caplog.at_level(logging.WARNING, plugin.logger.name):
        plugin.register()
    assert (dict(ModelRegistry.models), dict(MODELS_CONFIG_MAP)) == before and not plugin.ORIGINALS
    assert "0.33" in caplog.text and "nothing is pruned" in caplog.text


def test_a_server_of_a_model_that_cannot_be_pruned_does_not_start_with_the_setting(tmp_path):
    LlamaConfig(architectures=["LlamaForCausalLM"], vocab_size=64).save_pretrained(tmp_path)
    args = dict(model=str(tmp_path), dtype="float32", skip_tokenizer_init=True)
    EngineArgs(**args).create_engine_config()
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        EngineArgs(**args, hf_overrides=METHOD).create_engine_config()
