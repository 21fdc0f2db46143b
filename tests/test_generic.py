# SPDX-License-Identifier: Apache-2.0
"""`adapter="generic"`: what it certifies, what it refuses, and that its certificate can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

import vtprune
from vtprune import adapters, example_prompts, generic
from vtprune.adapters.generic import Generic
from vtprune.eval import digitscenes
from vtprune.stages.call import Call
from vtprune.testing import check_adapter, families

CERTIFIED = ("llava", "video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_5", "internvl", "mistral3", "ministral3")


@pytest.fixture
def unknown(monkeypatch):
    """A function that builds a family's model after the library has forgotten its adapter."""

    def build(name: str, **options):
        model = families.build(name, **options)
        adapters.list_adapters()
        monkeypatch.delitem(adapters._ADAPTERS, model.config.model_type)
        return model

    return build


def refused(model, method="divprune") -> str:
    with pytest.raises(vtprune.VTPruneError) as caught:
        vtprune.prune(model, method, keep_ratio=0.5, adapter="generic")
    return str(caught.value)


@pytest.mark.parametrize("name", CERTIFIED)
@torch.no_grad()
def test_a_certified_model_keeps_what_its_own_adapter_keeps(name, unknown, one_thread):
    model = families.shared(name)
    inputs = families.batch(name, model).inputs
    with vtprune.prune(model, "divprune", keep_ratio=0.3) as own:
        expected = model(**inputs).logits
    model = unknown(name)
    with vtprune.prune(model, "divprune", keep_ratio=0.3, adapter="generic") as session:
        got = model(**inputs).logits
    assert type(session.adapter) is Generic and session.report.encoder_flops is None
    kept = [[report.kept(sample, 0).tolist() for sample in range(3)] for report in (own.report, session.report)]
    assert kept[0] == kept[1] and session.report.keep_ratio < 0.5
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "name, why",
    [
        ("gemma3", "builds its own attention masks"),
        ("qwen3_vl", "added to its visual tokens in several layers"),
        ("llava_next", "checking it failed"),
        ("paligemma", "without vtprune a padded batch differs from its samples alone"),
    ],
)
def test_what_it_cannot_know_is_refused(name, why, unknown, one_thread):
    message = refused(unknown(name))
    assert message.startswith("the generic adapter does not fit a ") and why in message


def test_a_model_without_weights_is_refused(unknown):
    assert "without weights" in refused(unknown("llava").to("meta"))


def test_a_model_with_an_adapter_of_its_own_is_refused():
    assert "has an adapter of its own, which knows more" in refused(families.shared("llava"))


def test_there_is_no_other_adapter_by_name():
    with pytest.raises(vtprune.ConfigError, match="adapter='llava': give 'generic'"):
        vtprune.prune(families.shared("llava"), "divprune", keep_ratio=0.5, adapter="llava")


@pytest.mark.parametrize(
    "method, why",
    [
        ("fastv", "reads LastQueryAttention"),
        ("transprune", "reads"),
        ("mmtok", "reads EncoderFeatures"),
        ("fastervlm", "reads EncoderSaliency"),
        ("tome", "acts in stage 'encoder'"),
    ],
)
def test_methods_that_need_more_than_features_are_refused(method, why, unknown, monkeypatch):
    monkeypatch.setattr(generic, "_fault", lambda adapter: pytest.fail("the model ran"))
    message = refused(unknown("llava"), method)
    assert message.startswith(f"{method} {why}") and "divprune, random, uniform" in message


@torch.no_grad()
def test_videos_are_refused(unknown, one_thread):
    model = unknown("qwen2_vl")
    batch = families.batch("qwen2_vl", model, media="video")
    with (
        vtprune.prune(model, "divprune", keep_ratio=0.5, adapter="generic", strict=False),
        pytest.raises(vtprune.UnsupportedStageError, match="knows no videos"),
    ):
        model(**batch.inputs)


def test_a_model_is_asked_once(unknown, monkeypatch, one_thread):
    model = unknown("llava")
    vtprune.prune(model, "divprune", keep_ratio=0.5, adapter="generic")
    monkeypatch.setattr(generic, "_fault", lambda adapter: pytest.fail("asked again"))
    vtprune.prune(model, "random", keep_ratio=0.5, adapter="generic")


@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl"])
def test_an_adapter_that_derives_from_it_states_three_facts(name, unknown, monkeypatch, one_thread):
    model = unknown(name)

    class Placeholders(vtprune.Generic):
        model_types = (model.config.model_type,)
        family = "Placeholders"
        layout = "one grid an image"

    monkeypatch.setitem(adapters._ADAPTERS, model.config.model_type, Placeholders)
    results = check_adapter(model, families.batch(name, model).inputs)
    passed = {(result.check, result.method) for result in results if result.passed}
    assert {("layout", ""), ("features", ""), ("batch", "divprune"), ("cached", "fastv"), ("rows", "fastv")} <= passed
    assert {result.status for result in results} == {"ok", "refused"}


# -- the certificate can fail -----------------------------------------------------------------------------------------


def test_positions_that_are_wrong_are_found(unknown, monkeypatch, one_thread):
    right = Call.positions_at
    monkeypatch.setattr(Call, "positions_at", lambda self, layer: right(self, layer) * 2)
    assert "hidden states differ by" in refused(unknown("internvl"))


def test_pixels_that_depend_on_the_batch_are_found(unknown, monkeypatch, one_thread):
    """As in the first trial of such an adapter: packed patches were taken for one image a row."""
    monkeypatch.setattr(Generic, "pixels", lambda self, kind, inputs: inputs["pixel_values"])
    assert "other tokens are kept than alone" in refused(unknown("qwen2_vl"))


def test_a_layout_that_is_wrong_is_found(unknown, monkeypatch, one_thread):
    media = Generic.media
    monkeypatch.setattr(Generic, "media", lambda self, *given: media(self, *given)[:1])
    assert "two images were encoded as 1" in refused(unknown("internvl"))


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_the_checkpoints_processor_makes_the_prompts(monkeypatch, one_thread):
    folder = Path(digitscenes.__file__).parent / "model"
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    prompts = example_prompts.example_prompts(Generic(model))
    lengths = [inputs["input_ids"].shape[1] for inputs in prompts.alone]
    assert lengths[0] != lengths[1] and prompts.together["input_ids"].shape == (2, max(lengths))
    for sample, inputs in enumerate(prompts.alone):
        assert torch.equal(prompts.together["input_ids"][[sample], prompts.first_column(sample) :], inputs["input_ids"])
        assert not prompts.together["attention_mask"][sample, : prompts.first_column(sample)].any()
    adapters.list_adapters()
    monkeypatch.delitem(adapters._ADAPTERS, model.config.model_type)
    monkeypatch.setattr(example_prompts, "_made_up", lambda adapter: pytest.fail("made up"))
    assert vtprune.prune(model, "divprune", keep_ratio=0.5, adapter="generic").adapter.layout.startswith("one group")
