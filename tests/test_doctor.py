# SPDX-License-Identifier: Apache-2.0
"""`vtprune doctor` as a user meets it: what it prints, and how it ends."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from testing import broken
from typer.testing import CliRunner

import vtprune
from vtprune import doctor
from vtprune.adapters import adapter_for
from vtprune.cli import app
from vtprune.testing import families
from vtprune.testing.promises import CHECKS

MODELS = Path(vtprune.__file__).parents[1] / "eval" / "digitscenes"


pytestmark = pytest.mark.usefixtures("one_thread")


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["doctor", *map(str, arguments)])


def cells(output: str, name: str) -> list[list[str]]:
    """The cells behind a name, of each table row that begins with it."""
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in output.splitlines() if "│" in line]
    return [row[1:] for row in rows if row[0] == name]


def with_fault(monkeypatch, fault):
    build = families.build

    def faulty(*args, **kwargs):
        model = build(*args, **kwargs)
        fault(model)
        return model

    monkeypatch.setattr(families, "build", faulty)


def test_a_sound_family_passes():
    result = invoke("--family", "qwen2_5_vl")
    assert result.exit_code == 0, result.output
    assert cells(result.output, "qwen2_5_vl") == [["ok"] * len(CHECKS)]
    assert f"transformers  {transformers.__version__} (vtprune is tested with 5." in result.output
    assert torch.__version__ in result.output and "Every promise holds." in result.output
    assert "logits 0.0001" in result.output
    assert max(map(len, result.output.splitlines())) <= 80


@pytest.mark.slow
def test_every_family_passes():
    result = invoke()
    assert result.exit_code == 0, result.output
    for name in families.NAMES:
        # Inside a language model that carries a state nothing is dropped, so there are no rows of attention to check.
        # Nor are there where queries and keys come from one projection.
        rowless = adapter_for(families.shared(name)).carries_state or name in ("fuyu", "phi4_multimodal")
        assert cells(result.output, name) == [["ok"] * (len(CHECKS) - rowless) + ["-"] * rowless]
    assert max(map(len, result.output.splitlines())) <= 80


def test_a_decoder_that_takes_its_cache_under_another_name_fails(monkeypatch):
    with_fault(monkeypatch, broken.takes_cache_under_another_name)
    result = invoke("--family", "llava")
    assert result.exit_code == 1, result.output
    (row,) = cells(result.output, "llava")
    assert set(row) <= {"FAILED", "error"}
    told = " ".join(result.output.split())
    assert "llava, batch, divprune:" in told and "in a padded batch samples get other answers than alone" in told
    assert "NOT every promise holds." in told


def test_a_padded_batch_that_is_wrong_fails(monkeypatch):
    with_fault(monkeypatch, broken.ignores_padding)
    result = invoke("--family", "internvl")
    assert result.exit_code == 1
    told = " ".join(result.output.split())
    assert "internvl, batch, divprune: FAILED. measured" in told and "allowed 0.0001." in told
    assert "without vtprune batch and samples differ by" in told


def test_wrong_attention_rows_fail(monkeypatch):
    broken.score_wrongly(monkeypatch)
    result = invoke("--family", "llava")
    assert result.exit_code == 1
    ((*others, rows),) = cells(result.output, "llava")
    assert rows == "FAILED" and set(others[:1] + others[2:]) == {"ok"}
    assert "methods that go by attention inside the LLM choose by wrong" in " ".join(result.output.split())


def test_a_refusal_on_a_tiny_model_fails(monkeypatch):
    """The library is made for these: a release on which they are refused is one that it does not work with."""

    def refuse(*args, **kwargs):
        raise vtprune.UnsupportedStageError("this one is too new")

    monkeypatch.setattr(vtprune, "prune", refuse)
    result = invoke("--family", "llava")
    assert result.exit_code == 1
    assert cells(result.output, "llava") == [["refused"] * len(CHECKS)]
    assert "llava, rows, fastv: refused. this one is too new." in " ".join(result.output.split())


def test_a_family_that_transformers_lacks_is_named(monkeypatch):
    monkeypatch.delattr(transformers, families.model_class("llava"))
    monkeypatch.setattr(families, "is_available", lambda name: name != "llava")
    row = doctor.check_family("llava", doctor.Settings())
    assert row.absent == f"not in transformers {transformers.__version__}" and row.results == ()
    result = invoke("--family", "llava")
    assert cells(result.output, "llava") == [["-"] * len(CHECKS)]
    assert f"llava: not in transformers {transformers.__version__}" in result.output
    assert result.exit_code == 1 and result.output.endswith("Nothing was checked.\n")


def test_a_family_whose_package_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "llava", replace(families.FAMILIES["llava"], package="not_installed"))
    assert doctor.check_family("llava", doctor.Settings()).absent == "not_installed is not installed"


@pytest.mark.parametrize("model", ["model", pytest.param("video_model", marks=pytest.mark.slow)])
def test_a_checkpoint_passes(model):
    result = invoke("--model", MODELS / model)
    assert result.exit_code == 0, result.output
    for check in CHECKS:
        methods = ("divprune", "fastv") if check != "rows" else ("fastv",)
        rows = cells(result.output, check)
        assert [row[:2] for row in rows] == [[method, "ok"] for method in methods]
        for _, _, measured, allowed in rows:
            assert float(measured) <= float(allowed)


def test_a_checkpoint_is_asked_with_pictures_of_different_sizes():
    from vtprune.eval.inputs import load_model

    model, processor = load_model(str(MODELS / "video_model"))
    batch = doctor.checkpoint_batch(model, processor)
    lengths = [single["input_ids"].shape[1] for single in batch.singles]
    assert len(set(lengths)) == 3 and batch.pads == [max(lengths) - length for length in lengths]
    for sample, single in enumerate(batch.singles):
        assert torch.equal(batch.inputs["input_ids"][sample, batch.pads[sample] :], single["input_ids"][0])
        images = int(torch.isin(single["input_ids"], torch.tensor(batch.visual_ids)).sum())
        assert images > 0
    assert doctor.picture((30, 20), 1).size == (30, 20)
    assert doctor.picture((30, 20), 1).tobytes() == doctor.picture((30, 20), 1).tobytes()
    assert doctor.picture((30, 20), 1).tobytes() != doctor.picture((30, 20), 2).tobytes()


def test_bfloat16_states_its_tolerances():
    result = invoke("--family", "llava", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "Tolerances, bfloat16: keep all exactly; logits 4 times the unpatched model's own difference" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--family", "lava"), "error: --family 'lava': expected one of llava, pixtral"),
        (("--dtype", "int8"), "error: --dtype 'int8': expected float32, bfloat16, float16"),
        (("--device", "cuda:77"), "error: device 'cuda:77' cannot be used: "),
        (("--device", "nowhere"), "error: device 'nowhere' cannot be used: "),
        (("--attention", "flash_attention_2"), "error: --attention flash_attention_2 computes in bfloat16 or float16"),
        (("--model", "./nowhere"), "error: model './nowhere' cannot be loaded"),
    ],
)
def test_an_option_that_cannot_be_used_is_one_line(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1
