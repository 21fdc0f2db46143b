# SPDX-License-Identifier: Apache-2.0
"""The table of suites and the configs for `lmms_eval --config`, against the tasks of the installed lmms-eval."""

import importlib
import sys
from pathlib import Path

import pytest
import yaml

import vtprune.eval

FOLDER = Path(vtprune.eval.__file__).parent / "configs" / "lmms"
SUITES = yaml.safe_load((FOLDER / "suites.yaml").read_text())
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "suites")
PAPERS = {
    *("GQA", "MMBench", "MME", "POPE", "ScienceQA", "VQAv2", "TextVQA", "VizWiz", "SEED-Bench", "OCRBench", "DocVQA"),
    *("ChartQA", "RefCOCO", "HallusionBench", "MVBench", "EgoSchema", "MLVU", "LongVideoBench", "Video-MME", "NExT-QA"),
}


@pytest.fixture(scope="module")
def registry():
    from lmms_eval.tasks import TaskManager

    return TaskManager(model_name="vtprune")


def raw(registry, name: str) -> dict:
    """A task's file without the code it names; of a group, that of its first task."""
    from lmms_eval.utils import load_yaml_config

    config = load_yaml_config(registry.task_index[name]["yaml_path"], mode="simple")
    return raw(registry, config["task"][0]) if isinstance(config["task"], list) else config


def test_every_suite_is_there_once():
    names = [suite["name"] for suite in SUITES]
    assert set(names) >= PAPERS and len(set(names)) == len(names)
    assert {suite["judge"] for suite in SUITES} == {"none", "fallback", "yes"}


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite["name"])
def test_a_suite_is_what_lmms_eval_has(registry, suite):
    config = raw(registry, suite["task"])
    assert suite["metric"] in [metric["metric"] for metric in config["metric_list"]]
    assert (config.get("generation_kwargs") or {}).get("max_new_tokens") == suite["max_new_tokens"]
    prompts = set(config.get("lmms_eval_specific_kwargs") or {}) - {"default", "sub_task"}
    assert prompts == set(suite["prompts"])
    assert config.get("output_type", "generate_until") == "generate_until"  # what the chat model answers


@pytest.fixture(scope="module")
def keys():
    """What lmms-eval takes in a config."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lmms_eval"])
        parser, _ = importlib.import_module("lmms_eval.__main__").parse_eval_args()
    del sys.modules["lmms_eval.__main__"]  # its presence means that lmms-eval's command is running
    return {action.dest for action in parser._actions}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_one_that_lmms_eval_reads(keys, name):
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert set(config) <= keys
    assert config["model"] == "vtprune" and config["output_path"] == f"results/lmms-{name}"


def test_every_suite_is_in_a_config():
    tasks = [yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["tasks"].split(",") for name in CONFIGS]
    listed = [task for own in tasks for task in own]
    assert sorted(listed) == sorted(suite["task"] for suite in SUITES)
