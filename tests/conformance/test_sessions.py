# SPDX-License-Identifier: Apache-2.0
"""What people do with a model or a cache while a session is on it: right, or an error by name; never silently wrong."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from transformers import DynamicCache

import vtprune
from vtprune.errors import UnsupportedStageError, VTPruneError
from vtprune.testing import families
from vtprune.testing.traces import fingerprint
from vtprune.transformers_private import CACHE

from . import models
from .methods import spec
from .models import batch_of_three, prompts
from .reference import assert_recomputed, generate

EVERYONE = ("llava", "qwen2_5_vl", "internvl", "gemma3", "mistral3")


# -- one session, entered and left -------------------------------------------------------------------------------------


def test_a_session_is_entered_in_one_place(gqa):
    batch = batch_of_three(gqa)
    with vtprune.prune(gqa, spec("uniform", positions="original")) as session:
        with pytest.raises(VTPruneError, match="entered already"), session:
            pass
        output = generate(gqa, batch.inputs())  # and the outer block goes on
    assert_recomputed(gqa, batch, session.report, output, "original")
    with session:  # once more, one after the other
        again = generate(gqa, batch.inputs())
    assert all(map(torch.equal, output.logits, again.logits))
    handle = vtprune.patch(gqa, spec("uniform"))
    with handle:  # `patch` has no block of its own
        generate(gqa, batch.inputs(), new_tokens=1)
    assert not handle._handles


def test_a_strict_session_that_saw_no_call_says_so(gqa):
    unseen = pytest.warns(UserWarning, match="no call of the model reached this vtprune session")
    with unseen, vtprune.prune(gqa, spec("uniform")):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with vtprune.prune(gqa, spec("uniform"), strict=False):
            pass
        with vtprune.prune(gqa, "uniform", keep_ratio=1.0):
            pass
        with vtprune.prune(gqa, spec("uniform")):
            generate(gqa, batch_of_three(gqa).inputs(), new_tokens=1)
        with pytest.raises(ZeroDivisionError), vtprune.prune(gqa, spec("uniform")):
            1 / 0  # noqa: B018 (it has a reason of its own to end)


def test_patched_models_are_freed():
    freed = []
    for _ in range(3):
        model = models.build("gqa")
        session = vtprune.patch(model, spec("fastv"))
        generate(model, batch_of_three(model).inputs(), new_tokens=1)
        freed.append(weakref.ref(model))
        del model, session
    gc.collect()
    assert [reference() for reference in freed] == [None] * 3


# -- copies of a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["vtc_cls", "mmtok", "fastv", "transprune"])
def test_a_patched_model_is_not_copied(name, copies):
    model = models.build("gqa")
    before = fingerprint(model)
    with vtprune.prune(model, spec(name), strict=False):
        inside = fingerprint(model)
        with pytest.raises(VTPruneError, match="cannot be copied or pickled while a vtprune session is on it"):
            copies(model)
        assert fingerprint(model) == inside
    assert fingerprint(model) == before
    copied = copy.deepcopy(model)
    assert fingerprint(copied) == before


# -- copies of a cache -------------------------------------------------------------------------------------------------


def through_pickle(cache):
    return pickle.loads(pickle.dumps(cache))


@pytest.mark.parametrize("copies", [copy.deepcopy, through_pickle], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("method", ["divprune", "fastv", "mustdrop"])
@torch.no_grad()
def test_one_prefill_and_many_questions(method, copies):
    """Each question on a copy of the pruned cache gives what it gives on a cache of its own."""
    model = models.shared("mha")
    first, questions = prompts(model, "tItttt"), [torch.tensor([[7, 8, 9]]), torch.tensor([[11, 12, 13, 14]])]
    with vtprune.prune(model, method, keep_ratio=0.5):
        prefilled = model(**first.inputs(), use_cache=True)[CACHE]
        length = prefilled.get_seq_length()
        for question in questions:
            own = model(**first.inputs(), use_cache=True)[CACHE]
            expected = model(input_ids=question, **{CACHE: own}).logits
            copied = copies(prefilled)
            got = model(input_ids=question, **{CACHE: copied}).logits
            assert torch.equal(got, expected)
            assert copied.get_seq_length() == length + question.shape[1]
        assert prefilled.get_seq_length() == length == len(first.ids[0])
    with pytest.raises(VTPruneError, match="has been removed"):
        model(input_ids=questions[0], **{CACHE: copies(prefilled)})


@torch.no_grad()
def test_a_copied_cache_is_repeated_and_selected():
    model = models.shared("gqa")
    batch, more = batch_of_three(model), torch.tensor([[7, 8], [9, 10], [11, 12]])
    inputs = batch.inputs()
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    with vtprune.prune(model, spec("fastv")):
        cache = model(**inputs, use_cache=True)[CACHE]
        expected = model(input_ids=more, attention_mask=mask, **{CACHE: copy.deepcopy(cache)}).logits
        chosen = copy.deepcopy(cache)
        chosen.batch_repeat_interleave(2)
        chosen.batch_select_indices(torch.tensor([5, 0]))
        got = model(input_ids=more[[2, 0]], attention_mask=mask[[2, 0]], **{CACHE: chosen}).logits
        torch.testing.assert_close(got, expected[[2, 0]], atol=1e-5, rtol=0)
        turned = copy.deepcopy(cache)
        turned.reorder_cache(torch.tensor([1, 2, 0]))
        got = model(input_ids=more[[1, 2, 0]], attention_mask=mask[[1, 2, 0]], **{CACHE: turned}).logits
        torch.testing.assert_close(got, expected[[1, 2, 0]], atol=1e-5, rtol=0)


# -- packed samples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", EVERYONE)
@torch.no_grad()
def test_packed_samples_are_refused(name, use_cache):
    model = families.build(name)
    single = families.batch(name, model).singles[0]
    length = single["input_ids"].shape[1]
    packed = {key: torch.cat([value, value], int(value.shape[:2] == (1, length))) for key, value in single.items()}
    del packed["attention_mask"]
    packed["position_ids"] = torch.arange(length).repeat(2)[None]
    for method in ("uniform", "fastv"):
        with (
            vtprune.prune(model, method, keep_ratio=0.5),
            pytest.raises(UnsupportedStageError, match="packed samples .* cannot be pruned"),
        ):
            model(**packed, use_cache=use_cache)
        with (
            vtprune.prune(model, method, keep_ratio=0.5),
            pytest.raises(UnsupportedStageError, match="packed samples"),
        ):
            model(**single, cu_seq_lens_q=torch.tensor([0, length]))
    with vtprune.prune(model, "uniform", keep_ratio=1.0):
        kept = model(**packed, use_cache=use_cache).logits
    assert torch.equal(kept, model(**packed, use_cache=use_cache).logits)


@torch.no_grad()
def test_positions_that_run_on_are_no_packed_samples(gqa):
    batch = prompts(gqa, "tItttt")
    inputs = batch.inputs()
    del inputs["attention_mask"]
    places = torch.arange(inputs["input_ids"].shape[1])[None]
    with vtprune.prune(gqa, spec("uniform", positions="original")):
        expected = gqa(**batch.inputs(), use_cache=False).logits
        got = gqa(**inputs, position_ids=places, use_cache=False).logits
        late = gqa(**inputs, position_ids=places + 3, **{CACHE: DynamicCache()}).logits
    torch.testing.assert_close(got, expected)
    assert not torch.equal(late, expected)
