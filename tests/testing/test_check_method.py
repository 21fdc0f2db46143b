# SPDX-License-Identifier: Apache-2.0
"""`check_method` passes sound methods of a package outside, and names what others break."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers

import vtprune
import vtprune.signals
from vtprune import session_life
from vtprune.testing import Case, PromiseBroken, check_method, families
from vtprune.testing.promises import run_check

from .outside import Gathers, GathersInside, LongStates

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "method",
    [LongStates, Gathers, pytest.param(GathersInside(positions="original"), marks=pytest.mark.slow)],
    ids=["a signal of its own", "merges before", "merges inside"],
)
def test_methods_of_a_package_outside_pass_on_all_that_differ(method):
    results = check_method(method)
    names = {name for name in families.NAMES if name not in families.KINDRED}
    assert {result.where for result in results} == {f"{name}, image" for name in names}
    # The others act inside the language model.
    refused = set() if method is Gathers else names & set(families.CARRY_STATE)
    assert {result.where for result in results if result.status == "refused"} == {f"{name}, image" for name in refused}
    wrong = [result for result in results if result.status not in ("ok", "refused")]
    assert not wrong, wrong


def test_merging_inside_the_llm_passes_where_more_is_added_later():
    """Qwen3-VL adds DeepStack features behind its first layers, to merged tokens, too."""
    assert all(result.passed for result in check_method(GathersInside, families=["llava", "qwen3_vl"]))


@pytest.mark.slow
@pytest.mark.parametrize("method", [LongStates, Gathers])
def test_videos(method):
    assert check_method(method, families=["llava_next_video", "qwen3_vl"], media=["video", "mixed"])


def test_what_the_recompute_does_not_know_is_said():
    results = check_method({"name": "lazyllm", "keep_ratio": 0.5}, families=["llava"])
    assert {r.check for r in results if r.status == "refused"} == {"cached", "2nd turn"}
    assert {r.check for r in results if r.passed} >= {"keep all", "batch", "removal", "chance"}


def test_a_second_turn_that_the_model_itself_numbers_in_another_way_is_no_fault_of_the_method():
    """Qwen2.5-VL numbers what follows a video in another way in a second turn, without a session, too."""
    results = check_method({"name": "divprune", "keep_ratio": 0.5}, families=["qwen2_5_vl"], media=["video", "image"])
    (refused,) = [result for result in results if not result.passed]
    assert (refused.check, refused.where, refused.status) == ("2nd turn", "qwen2_5_vl, video", "refused")
    assert "in a second turn: without pruning it is off by" in refused.detail


def test_refusals_are_returned_and_all_of_them_are_a_fault():
    method = {"name": "vtc_cls", "keep_ratio": 0.5}
    results = check_method(method, families=["llava", "gemma3"])
    (refused,) = [result for result in results if not result.passed]
    assert (refused.check, refused.where, refused.status) == ("session", "gemma3, image", "refused")
    with pytest.raises(PromiseBroken, match="every family refuses vtc_cls:\n.*gemma3, image: .*CLS token"):
        check_method(method, families=["gemma3"])


# -- faults ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Faulty(vtprune.BeforeLLM):
    name: ClassVar[str] = "faulty"
    signal: ClassVar[str] = "-"

    how: str

    def scores(self, tokens):
        norms = tokens.features.norm(dim=-1)
        places = torch.arange(norms.shape[1]).expand_as(norms).float()
        return {
            "neighbours": lambda: norms - norms.mean(0) * (2 if len(norms) > 1 else 0),
            "torch": lambda: torch.rand(norms.shape),
            "python": lambda: norms + random.random() * 0,
            "fixed but read": lambda: torch.rand(norms.shape, generator=_same_as_global()),
            "padding": lambda: (places - norms.shape[1] / 2).abs(),
        }[self.how]()


def _same_as_global():
    return torch.Generator().manual_seed(torch.initial_seed())


@dataclass(frozen=True, kw_only=True)
class ByColumn(vtprune.CutOnce):
    """Keeps every second column of the padded batch."""

    name: ClassVar[str] = "by_column"
    signal: ClassVar[str] = "-"
    share: float = 0.5

    def signals(self, shape):
        return (Columns(),)

    def scores(self, tokens):
        return tokens[Columns()] % 2


@dataclass(frozen=True)
class Columns(vtprune.signals.LayerSignal):
    def read_layer(self, view):
        n = view.hidden.shape[1]
        return view.groups.gather(torch.arange(n).expand(len(view.hidden), n).float())


@pytest.mark.parametrize(
    ("method", "family", "promise"),
    [
        (Faulty(how="neighbours", keep_ratio=0.5), "llava", "batch"),
        (Faulty(how="padding", keep_ratio=0.5), "pixtral", "batch"),
        (ByColumn(), "llava", "batch"),
        (Faulty(how="torch", keep_ratio=0.5), "llava", "chance"),
        (Faulty(how="python", keep_ratio=0.5), "llava", "chance"),
        (Faulty(how="fixed but read", keep_ratio=0.5), "llava", "chance"),
    ],
    ids=["neighbours", "padding", "column", "torch", "python", "seed is read"],
)
def test_a_fault_of_a_method_is_named(method, family, promise):
    with pytest.raises(PromiseBroken, match=f"{family}, image, {promise}, {method.name}: FAILED") as caught:
        check_method(method, families=[family])
    assert isinstance(caught.value, AssertionError) and "It means: " in str(caught.value)
    if promise == "batch":
        assert "allowed 0.0001" in str(caught.value) and "samples keep other tokens alone" in str(caught.value)


def leaves_a_hook(model):
    model.register_forward_pre_hook(
        lambda m, args: m.lm_head.register_forward_hook(lambda *_: None) and None if session_life.ACTIVE else None
    )


def leaves_a_weight_changed(model):
    def hook(module, args):
        if session_life.ACTIVE:
            module.lm_head.weight.data += 1e-3

    model.register_forward_pre_hook(hook)


def switches_the_back_end(model):
    def hook(module, args):
        module.set_attn_implementation("eager" if session_life.ACTIVE else "sdpa")

    model.register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    ("fault", "promise", "words"),
    [
        (leaves_a_hook, "removal", "it is left on lm_head"),
        (leaves_a_weight_changed, "removal", "weights differ: lm_head.weight"),
    ],
)
def test_what_stays_behind_is_named(fault, promise, words):
    model = families.build("llava")
    fault(model)
    case = Case(model, families.batch("llava", model))
    with pytest.raises(PromiseBroken, match=f"LlavaForConditionalGeneration, {promise}, divprune: FAILED.*{words}"):
        check_method({"name": "divprune", "keep_ratio": 0.5}, families=[case])


def test_a_back_end_that_is_switched_is_found():
    """Other checks find other logits by then; this one says why."""
    model = families.build("llava")
    switches_the_back_end(model)
    result = run_check("back end", Case(model, families.batch("llava", model)), {"name": "divprune", "keep_ratio": 0.5})
    assert result.status == "failed" and "['sdpa'] became ['eager']" in result.detail


def test_a_report_that_miscounts_is_named(monkeypatch):
    cached = vtprune.Report.cached
    monkeypatch.setattr(vtprune.Report, "cached", lambda self, *args: cached(self, *args)[1:])
    with pytest.raises(PromiseBroken, match="llava, image, text, divprune: FAILED. measured 1, allowed 0"):
        check_method({"name": "divprune", "keep_ratio": 0.5}, families=["llava"])


def test_features_that_the_model_does_not_get_are_named(monkeypatch):
    """What a method merges has to arrive: dropped on the way, the recompute gives other logits."""
    import vtprune.stages.before_llm as stage

    cut = stage.cut_sequence

    def without_features(call, hidden, groups, selection, layer, **options):
        return cut(call, hidden, groups, vtprune.Selection(selection.keep, None, selection.sources), layer, **options)

    monkeypatch.setattr(stage, "cut_sequence", without_features)
    with pytest.raises(PromiseBroken, match="llava, image, cached, gathers: FAILED"):
        check_method(Gathers, families=["llava"])


def test_a_session_that_cannot_be_opened_is_a_fault_unless_it_is_refused():
    with pytest.raises(PromiseBroken, match="llava, image, session, fastv: error. ConfigError: fastv: layers"):
        check_method({"name": "fastv", "layer": 30}, families=["llava"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"families": ["lava"]}, "family 'lava': expected one of llava"),
        ({"media": ["pictures"]}, "expected some of image, video, mixed"),
        ({"media": "image"}, "in a list"),
        ({"families": ["llava"], "media": ["video"]}, "nothing to check"),
    ],
)
def test_arguments_that_mean_nothing_are_errors(arguments, words):
    with pytest.raises(vtprune.ConfigError, match=words):
        check_method("zero", **arguments)


def test_a_family_that_transformers_lacks_is_left_out(monkeypatch):
    monkeypatch.delattr(transformers, families.model_class("gemma3"))
    monkeypatch.setattr(families, "is_available", lambda name: name != "gemma3")
    assert {r.where for r in check_method("zero", families=["llava", "gemma3"])} == {"llava, image"}
