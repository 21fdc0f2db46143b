# SPDX-License-Identifier: Apache-2.0
"""`vtprune.prune(model, "auto", ...)`: the table's method, and the report that names it; and what a model supports."""

import pytest

import vtprune
from vtprune.adapters import list_adapters
from vtprune.auto import DEFAULTS, GENERAL, default_for
from vtprune.errors import BudgetError, ConfigError
from vtprune.eval.lmms.arguments import Arguments
from vtprune.methods import build_method, build_methods
from vtprune.support import fits, why_not
from vtprune.testing import families


@pytest.fixture(scope="module")
def llava():
    return families.shared("llava", "sdpa")


@pytest.fixture(scope="module")
def qwen():
    return families.shared("qwen2_5_vl", "sdpa")


def pruned(name, model, method, **parameters):
    batch = families.batch(name, model, media="image")
    with vtprune.prune(model, method, **parameters) as session:
        model(**batch.inputs)
    return session


def test_every_family_of_the_table_exists():
    assert DEFAULTS.keys() <= {adapter.family for adapter in list_adapters().values()}


@pytest.mark.parametrize(
    "name", ["llava", "llava_next_video", "llava_onevision", "video_llava", "qwen2_5_vl", "gemma3"]
)
def test_the_default_fits_its_family(name):
    model = families.shared(name, "sdpa")
    assert why_not(model, {**default_for(model).spec, "keep_ratio": 0.5}) is None


def test_the_report_names_the_method_and_the_reason(llava):
    session = pruned("llava", llava, "auto", keep_ratio=0.5)
    assert session.methods == [build_method("mmtok", keep_ratio=0.5)]
    (note,) = session.report.notes
    assert note.startswith("auto chose mmtok: coverage of question and image") and note in str(session.report)
    assert session.report.keep_ratio == pytest.approx(0.5, abs=0.1)


def test_a_method_that_the_caller_chose_has_no_reason(llava):
    assert pruned("llava", llava, "mmtok", keep_ratio=0.5).report.notes == ()


def test_parameters_replace_those_of_the_default(qwen):
    spec = {"name": "auto", "positions": "original"}
    (method,) = vtprune.prune(qwen, spec, keep_ratio=0.5, tau_text=0.05).methods
    assert method == build_method(
        {"name": "mmtok", "scope": "image", "positions": "original", "tau_text": 0.05, "keep_ratio": 0.5}
    )


def test_other_families_have_the_general_default():
    model = families.shared("gemma3", "sdpa")
    assert default_for(model) == GENERAL
    (method,) = vtprune.prune(model, "auto", keep_ratio=0.5).methods
    assert method == build_method("divprune", keep_ratio=0.5)


def test_auto_needs_a_budget(llava):
    with pytest.raises(BudgetError, match="mmtok needs a budget"):
        vtprune.prune(llava, "auto")


def test_auto_stands_in_prune_only():
    with pytest.raises(ConfigError, match="'auto' depends on the model"):
        build_methods("auto", keep_ratio=0.5)
    with pytest.raises(ConfigError, match="'auto' depends on the model"):
        Arguments.of({"pretrained": "x", "method": "auto", "keep_ratio": 0.5}).methods()


def test_no_method_may_take_the_name():
    class Taken(vtprune.BeforeLLM):
        name = "auto"
        signal = "none"

    with pytest.raises(ConfigError, match="no method may be named 'auto'"):
        vtprune.register_method(Taken)


def test_what_fits_a_model(llava, qwen):
    found = fits(qwen)
    assert list(found) == list(vtprune.list_methods())
    assert found["mmtok"].reason is None and found["mmtok"].floor == 0.0
    assert "CLS token" in found["vtc_cls"].reason and fits(llava)["vtc_cls"].reason is None
    shape = vtprune.adapter_for(llava).shape
    cut = build_method("fastv").cuts(shape)[0]
    assert fits(llava)["fastv"].floor == pytest.approx(cut / shape.decoder_layers)
