# SPDX-License-Identifier: Apache-2.0
"""Promise 8: bad input gets a clear error and changes nothing; text-only prompts are a no-op."""

import pytest
import torch

import vtprune
from vtprune.testing.traces import fingerprint
from vtprune.transformers_private import CACHE

from . import models
from .methods import every_method, spec
from .models import batch_of_three, prompts
from .reference import generate


@every_method()
def test_prompt_without_images_is_a_no_op(gqa, name):
    inputs = prompts(gqa, "tttt", "ttttttt").inputs()
    plain = generate(gqa, inputs)
    with vtprune.prune(gqa, spec(name)) as session:
        pruned = generate(gqa, inputs)
    assert torch.equal(plain.sequences, pruned.sequences)
    assert all(map(torch.equal, plain.logits, pruned.logits))
    assert session.report.counts.sum() == 0


@pytest.mark.parametrize("name", ["uniform", "fastv", "transprune", "vtc_cls+fastv"])
def test_text_prompts_between_image_prompts(gqa, name):
    """Nothing of one prompt leaks into the next."""
    picture, text = batch_of_three(gqa).inputs(), prompts(gqa, "ttttt").inputs()
    plain = generate(gqa, text)
    with vtprune.prune(gqa, spec(name)):
        first = generate(gqa, picture)
        between = generate(gqa, text)
        second = generate(gqa, picture)
    assert all(map(torch.equal, plain.logits, between.logits))
    assert all(map(torch.equal, first.logits, second.logits))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["vtc_cls", "mmtok", "divprune", "fastv", "transprune"])
def test_features_that_are_not_finite(name, value):
    model = models.build("gqa")
    inputs = batch_of_three(model).inputs()
    generate(model, inputs, new_tokens=1)
    before = fingerprint(model)
    bad = dict(inputs, pixel_values=inputs["pixel_values"].clone())
    bad["pixel_values"][1, 0, 0, 0] = value
    with vtprune.prune(model, spec(name)) as session:
        with pytest.raises(vtprune.VTPruneError, match="(?i)nan|inf|finite"):
            generate(model, bad)
        good = generate(model, inputs)  # the session survives
    assert session.report.counts.sum() > 0 and not good.logits[0].isnan().any()
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["vtc_cls", "mmtok", "divprune", "random", "uniform", "fastv", "transprune"])
def test_budget_larger_than_the_image(gqa, name):
    with vtprune.prune(gqa, name, keep_tokens=26), pytest.raises(vtprune.BudgetError, match="26.*25|25.*26"):
        generate(gqa, prompts(gqa, "tItt").inputs())


@pytest.mark.parametrize(
    "budget", [{"keep_ratio": 0.0}, {"keep_ratio": 1.2}, {"keep_ratio": -1}, {"keep_tokens": -1}, {}]
)
def test_malformed_budgets(gqa, budget):
    with pytest.raises(vtprune.BudgetError):
        vtprune.patch(gqa, "mmtok", **budget)


def test_one_budget_at_a_time(gqa):
    with pytest.raises(vtprune.BudgetError, match="keep_ratio.*keep_tokens"):
        vtprune.patch(gqa, "mmtok", keep_ratio=0.5, keep_tokens=8)


def test_budget_under_the_floor_names_the_floor(mha):
    with pytest.raises(vtprune.BudgetError, match="25") as caught:
        vtprune.patch(mha, {"name": "fastv", "layer": 2, "keep_ratio": 0.1})
    assert caught.value.floor == pytest.approx(0.25)


def test_unknown_method_names_the_nearest(gqa):
    with pytest.raises(vtprune.VTPruneError, match="mmtok"):
        vtprune.patch(gqa, "mmtokk", keep_ratio=0.5)
    with pytest.raises(vtprune.VTPruneError, match="transprune"):
        vtprune.build_method("trans_prune")


def test_unknown_field_names_the_nearest():
    with pytest.raises(vtprune.ConfigError, match="layer"):
        vtprune.build_method({"name": "fastv", "laier": 2})


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "fastv", "layer": "two", "keep_ratio": 0.5},
        {"name": "fastv", "positions": "somewhere", "keep_ratio": 0.5},
        {"name": "transprune", "score": "all"},
        {"name": "transprune", "layers": (3, 2, 5), "schedule": (0.8, 0.5, 0.2)},
        {"name": "transprune", "layers": (1, 2), "schedule": (0.8, 0.5, 0.2)},
        {"name": "transprune", "layers": (1, 2, 99), "schedule": (0.8, 0.5, 0.2)},
        {"name": "transprune", "layers": (1, 2, 3), "schedule": (0.2, 0.5, 0.8)},
    ],
    ids=str,
)
def test_fields_out_of_range(gqa, fields):
    with pytest.raises(vtprune.VTPruneError):
        vtprune.patch(gqa, fields)
    with vtprune.prune(gqa, spec("uniform")):  # the refused session does not block the next
        pass


def test_method_that_the_model_cannot_serve():
    with pytest.raises(vtprune.UnsupportedStageError, match="(?i)cls.*(mmtok|divprune)"):
        vtprune.patch(models.shared("siglip"), "vtc_cls", keep_ratio=0.5)


def test_unsupported_models_name_the_supported_ones():
    with pytest.raises(vtprune.UnsupportedModelError, match="(?i)llava"):
        vtprune.adapter_for(torch.nn.Linear(2, 2))
    with pytest.raises(vtprune.UnsupportedModelError, match="(?i)llava"):
        vtprune.patch(torch.nn.Linear(2, 2), "uniform", keep_ratio=0.5)


def test_nothing_pruned(gqa):
    inputs = prompts(gqa, "tItt").inputs()
    with vtprune.prune(gqa, "uniform", keep_ratio=0.99), pytest.raises(vtprune.NothingPrunedError, match="(?i)strict"):
        generate(gqa, inputs, new_tokens=1)
    with vtprune.prune(gqa, "uniform", keep_ratio=0.99, strict=False) as session:
        generate(gqa, inputs, new_tokens=1)
    assert session.report.keep_ratio == 1.0


def test_compiled_model_is_refused():
    with pytest.raises(vtprune.VTPruneError, match="(?i)compile"):
        vtprune.patch(torch.compile(models.build("gqa"), backend="eager"), "uniform", keep_ratio=0.5)


@pytest.mark.parametrize("name", ["uniform", "fastv", "transprune"])
def test_cache_reused_after_the_session(gqa, name):
    """Its layers hold fewer tokens than the model without hooks believes."""
    inputs = prompts(gqa, "tItt").inputs()
    with vtprune.prune(gqa, spec(name)):
        first = generate(gqa, inputs, new_tokens=3)
    again = {"input_ids": torch.cat([first.sequences, torch.tensor([[5, 6]])], 1)}
    again["attention_mask"] = torch.ones_like(again["input_ids"])
    with pytest.raises(vtprune.VTPruneError, match="(?i)session"):
        generate(gqa, again, **{CACHE: first[CACHE]})


def test_chunked_prefill_is_refused_or_exact(gqa):
    """A choice among all visual tokens cannot be made from one chunk of the prompt."""
    inputs = prompts(gqa, "ttIttttt").inputs()
    with vtprune.prune(gqa, spec("fastv")):
        whole = generate(gqa, inputs)
        try:
            chunked = generate(gqa, inputs, prefill_chunk_size=16)
        except vtprune.VTPruneError:
            return
    torch.testing.assert_close(torch.stack(whole.logits), torch.stack(chunked.logits), atol=1e-4, rtol=0)


def test_placeholders_without_their_image_are_refused(gqa):
    """Where the pixels are lost on the way, as in chunked prefill up to transformers 5.20."""
    inputs = prompts(gqa, "ttIttttt").inputs()
    del inputs["pixel_values"]
    with (
        vtprune.prune(gqa, spec("fastv")),
        pytest.raises(
            vtprune.UnsupportedStageError, match="holds 25 placeholders of visual tokens, but neither pixels"
        ),
    ):
        generate(gqa, inputs)
