# SPDX-License-Identifier: Apache-2.0
"""If what the hooks rely on does not arrive, the call ends in an error that names the installed and tested releases."""

from __future__ import annotations

import warnings

import pytest
import torch
from conformance import models
from transformers import DynamicCache

import vtprune
from vtprune.errors import UnsupportedModelError, UnsupportedStageError, VTPruneError
from vtprune.testing import families
from vtprune.transformers_private import CACHE, VERSION, release

pytestmark = pytest.mark.release
NAMES_RELEASES = rf"installed is transformers {VERSION}, and vtprune is tested with 5\.18 to 5\.24"


def renamed(monkeypatch, names: dict[str, str | None]):
    """A LLaVA whose base model calls its language model with some arguments renamed; None as a name drops one."""
    model = models.build("gqa")
    decoder = vtprune.adapter_for(model).language_model
    forward, back = decoder.forward, {new: old for old, new in names.items()}
    monkeypatch.setattr(
        decoder, "forward", lambda **given: forward(**{back.get(key, key): value for key, value in given.items()})
    )

    def rename(module, args, kwargs):
        given = {names.get(name, name): value for name, value in kwargs.items()}
        given.pop(None, None)
        return args, given

    # Registered first, so that the session's hook sees what a newer release would send.
    decoder.register_forward_pre_hook(rename, with_kwargs=True)
    return model


@pytest.mark.parametrize("method", ["divprune", "fastv"])
@torch.no_grad()
def test_a_cache_under_an_unknown_name_is_an_error(monkeypatch, method):
    model = renamed(monkeypatch, {CACHE: "kv_store"})
    inputs = models.batch_of_three(model).inputs()
    plain = model(**inputs, **{CACHE: DynamicCache()}).logits  # the model itself works
    with (
        vtprune.prune(model, method, keep_ratio=0.5),
        pytest.raises(VTPruneError, match=f"arrives as 'kv_store', a name that is not known: {NAMES_RELEASES}"),
    ):
        model(**inputs, **{CACHE: DynamicCache()})
    assert torch.equal(model(**inputs, **{CACHE: DynamicCache()}).logits, plain)


@torch.no_grad()
def test_a_cache_that_does_not_arrive_is_an_error(monkeypatch):
    model = renamed(monkeypatch, {CACHE: None})
    inputs = models.batch_of_three(model).inputs()
    with (
        vtprune.prune(model, "divprune", keep_ratio=0.5),
        pytest.raises(VTPruneError, match=f"a KV cache is in use, but .* without it: {NAMES_RELEASES}"),
    ):
        model(**inputs, **{CACHE: DynamicCache()})


@pytest.mark.parametrize("where", ["decoder", "layer"])
@torch.no_grad()
def test_an_unknown_argument_with_one_entry_a_token_is_an_error(where):
    model = models.build("gqa")
    decoder = vtprune.adapter_for(model).language_model
    inputs = models.batch_of_three(model).inputs()
    module = decoder if where == "decoder" else decoder.layers[0]

    def add(module, args, kwargs):
        hidden = args[0] if args else kwargs["inputs_embeds"]
        return args, {**kwargs, "per_token": [{"gains": torch.ones(hidden.shape[:2])}], "one_a_head": torch.ones(4)}

    module.register_forward_pre_hook(add, with_kwargs=True)
    with (
        vtprune.prune(model, "divprune", keep_ratio=0.5),
        pytest.raises(UnsupportedStageError, match=f"'per_token', which holds one entry a token .*{NAMES_RELEASES}"),
    ):
        model(**inputs)
    with vtprune.prune(model, "divprune", keep_ratio=1.0):  # nothing is cut, so nothing is in the way
        kept = model(**inputs).logits
    assert torch.equal(kept, model(**inputs).logits)


def test_a_kind_of_layer_that_is_not_known_is_an_error():
    model = models.build("gqa")
    model.config.text_config.layer_types = ["full_attention", "holographic_attention"] * 3
    with pytest.raises(UnsupportedModelError, match=f"not known: holographic_attention; {NAMES_RELEASES}"):
        vtprune.prune(model, "divprune", keep_ratio=0.5)


def test_a_release_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(release, "VERSION", "5.17.1")
    with pytest.raises(UnsupportedModelError, match=r"too old: installed is transformers 5\.17\.1"):
        vtprune.prune(models.shared("gqa"), "divprune", keep_ratio=0.5)


def test_a_newer_release_is_said_once(monkeypatch):
    monkeypatch.setattr(release, "VERSION", "5.99.0")
    release._warn_untested.cache_clear()
    with pytest.warns(UserWarning, match=r"installed is transformers 5\.99\.0, .*run `vtprune doctor`"):
        vtprune.prune(models.shared("gqa"), "divprune", keep_ratio=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vtprune.prune(models.shared("gqa"), "divprune", keep_ratio=0.5)
    release._warn_untested.cache_clear()


@pytest.mark.parametrize("name", families.NAMES)
@torch.no_grad()
def test_no_call_of_ours_is_deprecated(name):
    model = families.build(name)
    inputs = families.batch(name, model).inputs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ("divprune", "fastv", "transprune") if name in families.PRUNED_INSIDE else ("divprune",):
            if (name, method) == ("exaone4_5", "transprune"):  # refused: it has no norm before its attention
                continue
            with vtprune.prune(model, method, keep_ratio=0.7):
                model.generate(**inputs, max_new_tokens=2)
