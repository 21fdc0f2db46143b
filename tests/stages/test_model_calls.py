# SPDX-License-Identifier: Apache-2.0
"""Calls of a tiny LLaVA (eight decoder layers, 36 visual tokens an image), followed from the pixels to the report."""

import contextlib
import copy
import pickle
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

import vtprune
from vtprune.errors import UnsupportedModelError, UnsupportedStageError, VTPruneError
from vtprune.guidance import Guidance
from vtprune.methods.fastv import FastV
from vtprune.stages.model_calls import ModelCalls
from vtprune.testing import families
from vtprune.transformers_private import CACHE

from .hand_made import ScriptedBefore, ScriptedInside

DEPTH, WHOLE = 8, 36
HALF = (range(18), range(18), range(18), range(18))
"""The first half of each of four images."""


@pytest.fixture(autouse=True)
def _fast(one_thread):
    with torch.no_grad():
        yield


@contextlib.contextmanager
def following(*methods, model=None, guidance=None, profile=False):
    """The model's calls are followed; gives what follows them, and what was reported: see `ModelCalls`."""
    adapter = vtprune.adapter_for(model or families.shared("llava"))
    reported = []
    guidance = guidance or Guidance(None, None)
    calls = ModelCalls(adapter, methods, guidance, lambda *finished: reported.append(finished), profile=profile)
    handles = []
    try:
        for handle in calls.install():
            handles.append(handle)
        yield calls, reported
    finally:
        calls.stop()
        for handle in handles:
            handle.remove()
        calls.forget()


def model():
    return families.shared("llava")


def batch(samples: int = 3):
    """Prompts of 7, 12 and 8 letters; two images side by side in the second one."""
    return families.batch("llava", model(), samples=samples)


def single():
    """One prompt: BOS, three tokens of text, an image in the columns 4 to 39, three tokens of text."""
    return dict(batch().singles[0])


def text_only(length: int = 5):
    return {"input_ids": torch.arange(2, 2 + length)[None], "attention_mask": torch.ones(1, length)}


IMAGE = torch.arange(4, 4 + WHOLE)


def test_a_prefill_is_reported_once():
    method = ScriptedInside(keeps=((range(18),),))
    with following(method) as (calls, reported):
        assert calls.prunes and not calls.reached
        model()(**single())
        assert calls.reached and calls.now.call is None and calls.now.incoming is None
    ((report, contents, wants_less),) = reported
    assert report.visual[0].tolist() == IMAGE.tolist() and report.text_tokens == (7,)
    assert report.kept(0, 1).tolist() == IMAGE.tolist() and report.kept(0, 2).tolist() == IMAGE[:18].tolist()
    assert wants_less and contents.columns is None and report.timings is None


def test_stages_follow_one_another():
    before, inside = ScriptedBefore(keeps=((range(20),),)), ScriptedInside(keeps=(([0, 3, 19],),), layers=(3,))
    with following(inside, before) as (_, reported):
        model()(**single())
    assert [r.start for r in reported[0][0].layer_ranges] == [0, 3]
    assert reported[0][0].kept(0, 0).tolist() == IMAGE[:20].tolist()
    assert reported[0][0].kept(0, -1).tolist() == IMAGE[[0, 3, 19]].tolist()
    assert before.seen[0].valid.shape == (1, WHOLE) and inside.seen[0].valid.shape == (1, 20)


@pytest.mark.parametrize("stage", [ScriptedBefore, ScriptedInside])
def test_outputs_have_the_length_of_the_call(stage):
    """A column that was dropped has the state of the last one before it that was not."""
    inputs = single()
    with following(stage(keeps=(([0, 5],),))):
        output = model()(**inputs, output_hidden_states=True)
    logits = output.logits[0]
    assert len(logits) == inputs["input_ids"].shape[1]
    assert torch.equal(logits[5:9], logits[4:5].expand(4, -1)) and torch.equal(
        logits[10:40], logits[9:10].expand(30, -1)
    )
    assert not torch.equal(logits[9], logits[8]) and not torch.equal(logits[40], logits[39])
    entering = output.hidden_states[0][0]
    assert torch.equal(entering[5], entering[4]) == (stage is ScriptedBefore)


def test_without_a_budget_below_everything_outputs_are_those_of_the_model():
    inputs = single()
    expected = model()(**inputs).logits
    with following(FastV(keep_ratio=1.0)) as (calls, reported):
        assert not calls.prunes
        assert torch.equal(model()(**inputs).logits, expected)
    assert reported[0][0].keep_ratio == 1.0 and not reported[0][2]


@pytest.mark.parametrize("count, wants_less", [(WHOLE, False), (WHOLE - 1, True)])
def test_counts_that_no_image_exceeds_ask_for_everything(count, wants_less):
    """Of two images in one prompt each has the count."""
    with following(FastV(keep_tokens=count)) as (_, reported):
        model()(**batch().inputs)
    assert reported[0][2] is wants_less


def test_prompts_of_text_are_reported_and_generated_tokens_are_not():
    with following(FastV(keep_ratio=0.5)) as (_, reported):
        output = model()(**text_only(5), use_cache=True)
        model()(input_ids=torch.tensor([[7]]), **{CACHE: output[CACHE]})
        model()(input_ids=torch.tensor([[7, 8]]), **{CACHE: output[CACHE]})
        model()(**text_only(1))
    ((report, contents, wants_less),) = reported
    assert report.original_tokens == [0] and report.text_tokens == (5,)
    assert not wants_less and contents.columns is None


def test_generated_tokens_on_a_pruned_cache_are_not_reported():
    with following(FastV(keep_ratio=0.5)) as (calls, reported):
        cache = model()(**single(), use_cache=True)[CACHE]
        model()(input_ids=torch.tensor([[7]]), **{CACHE: cache})
        assert calls.now.call is None
    assert len(reported) == 1 and cache.get_seq_length() == 44


# -- what the language model is called with -----------------------------------------------------------------------


@contextlib.contextmanager
def watching():
    """The arguments that the language model gets."""
    noted = []
    hook = (
        model()
        .get_decoder()
        .register_forward_pre_hook(lambda module, args, kwargs: noted.append(kwargs), with_kwargs=True)
    )
    yield noted
    hook.remove()


def test_the_language_model_gets_the_shorter_prompt():
    method = ScriptedBefore(keeps=(([0, 9],),), positions="original")
    with following(method), watching() as noted:
        model()(**single())
    (kwargs,) = noted
    assert kwargs["inputs_embeds"].shape[1] == 9 and kwargs["attention_mask"] is None
    assert kwargs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 13, 40, 41, 42]]


def test_a_second_turn_with_layers_of_different_lengths_is_masked_in_each():
    with following(ScriptedInside(keeps=((range(18),),))), watching() as noted:
        cache = model()(**single(), use_cache=True)[CACHE]
        model()(input_ids=torch.tensor([[7]]), **{CACHE: cache})
        model()(input_ids=torch.tensor([[7, 8]]), **{CACHE: cache})
    assert [layer.physical for layer in cache.layers] == [46] * 2 + [28] * 6
    assert [layer.get_seq_length() for layer in cache.layers] == [46] * 8
    assert noted[1]["position_ids"].tolist() == [[43]]


# -- choices ------------------------------------------------------------------------------------------------------


def test_choices_are_made_once_for_a_prompt_that_is_sent_again():
    inputs = single()
    features = model().get_image_features(inputs.pop("pixel_values"), return_dict=True)
    longer = {name: nn.functional.pad(value, (0, 1), value=1) for name, value in inputs.items()}
    method = ScriptedInside(keeps=(([0, 1],), ([2, 3],)))
    with following(method) as (_, reported):
        for prompt in (inputs, longer, inputs):
            model()(**prompt, mm_encoder_outputs={"image": features}, use_cache=False)
    assert len(method.seen) == 2, "the longer prompt goes on from the first one"
    kept = [report.kept(0, -1).tolist() for report, *_ in reported]
    assert kept == [IMAGE[[0, 1]].tolist(), IMAGE[[2, 3]].tolist()]


def test_pixels_are_never_a_repetition():
    inputs = single()
    longer = inputs | {
        name: nn.functional.pad(inputs[name], (0, 1), value=1) for name in ("input_ids", "attention_mask")
    }
    method = ScriptedInside(keeps=(([0, 1],),))
    with following(method) as (_, reported):
        for prompt in (inputs, longer):
            model()(**prompt, use_cache=False)
    assert len(method.seen) == len(reported) == 2


def test_times_are_measured_on_request():
    with following(ScriptedInside(keeps=((range(9),),)), profile=True) as (_, reported):
        model()(**single())
    timings = reported[0][0].timings
    assert timings.encoder > 0 and 0 < timings.selector < timings.prefill


@pytest.mark.parametrize("length, rows", [(None, 7), (41, 4 + 1)])
def test_the_session_says_where_the_prompt_ends(length, rows):
    with following(FastV(keep_ratio=0.5), guidance=Guidance(None, length)) as (_, reported):
        model()(**single())
    assert reported[0][0].text_tokens == (rows,)


# -- errors -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Failing(vtprune.BeforeLLM):
    name: ClassVar[str] = "failing"
    signal: ClassVar[str] = "-"

    def select(self, tokens):
        raise ZeroDivisionError


def test_a_call_that_failed_does_not_touch_the_next_one():
    with following(Failing(keep_ratio=0.5)) as (calls, reported):
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                model()(**single())
        expected = model()(**text_only())
    assert len(reported) == 1 and reported[0][0].original_tokens == [0]
    assert torch.equal(expected.logits, model()(**text_only()).logits)


def test_features_that_are_not_finite_are_refused():
    inputs = single()
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"][0, 0, 0, 0] = torch.inf
    with following(FastV(keep_ratio=0.5)), pytest.raises(VTPruneError, match="contain NaN or Inf; nothing was pruned"):
        model()(**inputs)


def test_placeholders_without_an_image_are_refused_where_something_is_pruned():
    inputs = single()
    del inputs["pixel_values"]
    with following(FastV(keep_ratio=0.5)), pytest.raises(UnsupportedStageError, match="holds 36 placeholders"):
        model()(**inputs)
    with following(FastV(keep_ratio=1.0)) as (_, reported):
        model()(**inputs)
    assert len(reported) == 1


def test_calls_that_cannot_be_pruned_run_where_nothing_is_to_be():
    inputs = single()
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.zeros(1, 1, length, length)
    with following(FastV(keep_ratio=0.5)), pytest.raises(UnsupportedStageError, match="4D attention mask"):
        model()(**inputs)
    with following(FastV(keep_ratio=1.0)) as (_, reported):
        model()(**inputs)
    assert not reported


def test_a_language_model_that_runs_without_hooks_is_an_error(monkeypatch):
    class Bare(nn.Module):
        """What a graph does that was compiled before."""

        def get_input_embeddings(self):
            return decoder.embed_tokens

        def forward(self, **kwargs):
            return decoder.forward(**kwargs)

    decoder = model().get_decoder()
    for method, fails in ((FastV(keep_ratio=0.5), True), (FastV(keep_ratio=1.0), False)):
        with following(method) as (calls, _), monkeypatch.context() as patch:
            patch.setitem(model().model._modules, "language_model", Bare())
            expected = pytest.raises(UnsupportedModelError, match="ran without the hooks")
            with expected if fails else contextlib.nullcontext():
                model()(**single())
            assert not calls.reached


def test_a_model_with_hooks_on_it_is_not_copied():
    with following(FastV(keep_ratio=0.5)):
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(VTPruneError, match="cannot be copied or pickled while"):
                copied(model())
    copy.deepcopy(model())


def test_calls_run_as_they_are_once_the_session_is_stopped():
    expected = model()(**single()).logits
    with following(ScriptedInside(keeps=((range(9),),))) as (calls, reported):
        calls.stop()
        assert torch.equal(model()(**single()).logits, expected)
    assert not reported


# -- DeepStack ----------------------------------------------------------------------------------------------------


IN_A_LIST = {"deepstack_visual_embeds": ["behind layer 0", "behind 1", "behind 2"], "visual_pos_masks": "mask"}
BY_LAYER = {"deepstack_features": {1: "behind layer 0", 2: "behind 1", 3: "behind 2"}, "vision_mask": "mask"}


@pytest.mark.parametrize("given", [IN_A_LIST, BY_LAYER])
@pytest.mark.parametrize("cut, pruned, taken", [(2, False, True), (5, False, False), (5, True, True)])
def test_deepstack_features_are_taken_over_where_tokens_go_missing_in_their_layers(cut, pruned, taken, given):
    with following(ScriptedInside(keeps=((range(9),),), layers=(cut,))) as (calls, _):
        call = SimpleNamespace(pruned=pruned, take_deepstack=lambda features, entering: (features, entering))
        kwargs = dict(given)
        got = calls._take_deepstack(call, kwargs, "came in", "pruned")
    assert got == ((BY_LAYER["deepstack_features"], "pruned") if taken else "came in")
    assert kwargs == ({} if taken else given)
