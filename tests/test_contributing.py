# SPDX-License-Identifier: Apache-2.0
"""The worked examples of CONTRIBUTING.md are run as they are printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conformance import models
from own_vlm import IMAGE, tiny_own_vlm, two_prompts

import vtprune
from vtprune import adapters, methods
from vtprune.testing import check_task

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


def example(name: str) -> str:
    return re.search(rf"<!-- tested: {name} -->\n```\w+\n(.*?)```", TEXT, re.DOTALL).group(1)


def run_example(name: str) -> dict:
    namespace = {"__name__": f"contributing_{name}"}
    exec(compile(example(name), "CONTRIBUTING.md", "exec"), namespace)
    return namespace


@pytest.fixture(autouse=True)
def _registries(monkeypatch):
    monkeypatch.setattr(methods, "_METHODS", vtprune.list_methods())
    monkeypatch.setattr(adapters, "_ADAPTERS", adapters.list_adapters())


def test_the_example_method_prunes():
    run_example("method")
    model = models.build("mha")
    ids = torch.tensor([[models.BOS, *[models.IMAGE_TOKEN] * models.tokens_per_image(model), 5, 6]])
    pixels = torch.randn(1, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), vtprune.prune(model, "feature_norm", keep_tokens=5) as session:
        model(input_ids=ids, pixel_values=pixels)
        features = model.get_image_features(pixels).pooler_output[0]
    expected = features.norm(dim=-1).topk(5).indices.sort().values + 1
    assert session.report.kept(0).tolist() == expected.tolist()


def test_the_example_adapter_prunes():
    model = tiny_own_vlm((-2, -3, 1))
    with pytest.raises(vtprune.UnsupportedModelError, match="no adapter for OwnVlm"):
        vtprune.adapter_for(model)
    run_example("adapter")
    assert vtprune.adapter_for(model).shape == vtprune.ModelShape(6, 6, feature_layer=4, has_cls=True)
    ids = torch.tensor([[1, *[IMAGE] * 16, 5, 6]])
    for name in ("vtc_cls", "mmtok", "fastv", "pool"):
        with torch.no_grad(), vtprune.prune(model, name, keep_ratio=0.5) as session:
            model.generate(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32), max_new_tokens=2)
        assert session.report.keep_ratio == pytest.approx(0.5, abs=0.03)


def test_the_examples_pass_the_checks(one_thread):
    run_example("method"), run_example("adapter")
    checks = run_example("checks")
    checks["test_the_method_keeps_the_promises"]()
    checks["test_the_adapter_keeps_the_promises"](*two_prompts())


def test_the_example_task_is_right():
    task = run_example("task")["squares"]()
    assert {result.status for result in check_task(task, 10)} == {"ok"}
    assert [example.answer for example in task.examples(6)] == ["0", "1", "2", "3", "4", "0"]


USE_OF_THE_PACKAGE = """
import sys
sys.path[:0] = [{tests!r}]
import vtprune
from own_vlm import two_prompts
from vtprune.cli import app

model, inputs = two_prompts()
print(type(vtprune.adapter_for(model)).__module__)
with vtprune.prune(model, "divprune", keep_ratio=0.25) as session:
    model.generate(**inputs, max_new_tokens=2)
print(session.report.final_tokens)
app(["models"])
"""


def test_an_adapter_in_a_package_of_its_own_is_found(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    (source / "pyproject.toml").write_text(example("package"))
    (source / "vtprune_own_vlm.py").write_text(example("adapter"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", site, source], check=True)
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", USE_OF_THE_PACKAGE.format(tests=str(Path(__file__).parent))]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert result.stdout.splitlines()[:2] == ["vtprune_own_vlm", "[4, 4]"]
    assert "OwnVLM" in result.stdout


def test_the_architecture_page_names_what_is_there():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "architecture.md").read_text()
    files = set(re.findall(r"[\w/]+\.py", page))
    assert len(files) > 15
    for file in files:
        places = (root / file, root / "vtprune" / file, root / "vtprune" / "stages" / file)
        assert any(place.exists() for place in places), f"{file} is not there"
    names = set(re.findall(r"`([A-Z][A-Za-z]+)`", page))
    known = {*dir(vtprune), *vars(vtprune.signals), "SequenceLayout"}
    assert names <= known, names - known
    assert names >= {"InEncoder", "BeforeLLM", "InLLM", "CutOnce", "Staged", "Progressive", "Reviving", "AfterPrefill"}
