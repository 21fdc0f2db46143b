# SPDX-License-Identifier: Apache-2.0
"""Each check passes on a sound model and fails on one with a fault of its kind."""

import pytest
import torch

from vtprune.testing import families
from vtprune.testing.promises import CHECKS, METHODS, Case, run_check, run_checks

from . import broken

DIVPRUNE, FASTV = METHODS
pytestmark = pytest.mark.usefixtures("one_thread")


def case(name="llava", fault=None) -> Case:
    model = families.build(name)
    batch = families.batch(name, model, samples=2)
    if fault is not None:
        fault(model)
    return Case(model, batch)


def test_a_sound_model_passes_every_check():
    results = run_checks(case())
    assert [(r.check, r.method) for r in results] == [
        *((check, method) for check in list(CHECKS)[:-1] for method in ("divprune", "fastv")),
        ("rows", "fastv"),
    ]
    for result in results:
        assert result.passed and result.status == "ok", result
        assert 0 <= result.measured <= result.tolerance <= 2e-4


FAULTS = [
    ("keep all", broken.adds_a_little),
    ("batch", broken.ignores_padding),
    ("batch", broken.takes_cache_under_another_name),
    ("cached", broken.spoils_cached_keys),
    ("2nd turn", broken.forgets_where_a_turn_begins),
    ("2nd turn", broken.takes_cache_under_another_name),
    ("static", broken.spoils_static_caches),
    ("static", broken.takes_cache_under_another_name),
]


@pytest.mark.parametrize(("check", "fault"), FAULTS, ids=[f"{check}-{fault.__name__}" for check, fault in FAULTS])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_a_fault_is_found(check, fault, method):
    result = run_check(check, case(fault=fault), method)
    assert not result.passed and result.status in ("failed", "error"), result
    if result.measured is not None:
        assert result.measured > result.tolerance
    else:
        assert result.detail


def test_what_was_measured_is_said():
    result = run_check("batch", case(fault=broken.ignores_padding), DIVPRUNE)
    assert result.status == "failed" and result.measured > 0.1
    assert "without vtprune batch and samples differ by" in result.detail


def test_a_fault_of_one_kind_fails_no_other_check():
    """A check that fails with any fault would say nothing."""
    faulty = case(fault=broken.forgets_where_a_turn_begins)
    assert {r.check for r in run_checks(faulty) if not r.passed} == {"2nd turn"}


def test_wrong_attention_rows_are_found(monkeypatch):
    broken.score_wrongly(monkeypatch)
    result = run_check("rows", case(), FASTV)
    assert result.status == "failed" and result.measured > 10 * result.tolerance
    assert result.detail == "decoder layer 1"


def test_a_cache_that_counts_what_it_stores_is_found(monkeypatch):
    monkeypatch.setattr("vtprune.stages.cache.PrunedLayer.get_seq_length", lambda self: self.inner.get_seq_length())
    result = run_check("2nd turn", case(), DIVPRUNE)
    assert not result.passed


def test_a_refusal_never_passes():
    result = run_check("keep all", case("gemma3"), {"name": "vtc_cls", "keep_ratio": 0.5})
    assert result.status == "refused" and not result.passed
    assert "CLS" in result.detail


@pytest.mark.parametrize("check", ["cached", "2nd turn"])
def test_a_model_that_the_recompute_does_not_know_is_not_called_wrong(check):
    result = run_check(check, case(fault=broken.scales_what_leaves_the_decoder), DIVPRUNE)
    assert result.status == "refused" and "the recompute does not know this model" in result.detail


def test_what_is_raised_is_told():
    result = run_check("batch", case(fault=broken.raises), DIVPRUNE)
    assert (result.status, result.detail) == ("error", "ValueError: out of order")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tolerances_of_shorter_floats(dtype):
    sound = case()
    halved = Case(sound.model.to(dtype), sound.batch.to("cpu", dtype))
    largest = max(step.abs().max().item() for step in halved.plain.logits)
    eps = torch.finfo(dtype).eps
    assert halved.tolerance == min(max(4 * halved.noise, 4 * eps * largest), 0.1 * largest)
    assert all(result.passed for result in run_checks(halved))
    broken.ignores_padding(halved.model)
    faulty = Case(halved.model, halved.batch)
    assert run_check("batch", faulty, DIVPRUNE).status == "failed", "noise of the model itself may not hide it"


def test_the_model_is_left_as_it_was():
    checked = case()
    before = [module.config._attn_implementation for module in checked.model.modules() if hasattr(module, "config")]
    run_checks(checked)
    after = [module.config._attn_implementation for module in checked.model.modules() if hasattr(module, "config")]
    assert before == after
    assert not any(m._forward_pre_hooks for m in checked.model.modules())
