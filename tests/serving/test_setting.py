# SPDX-License-Identifier: Apache-2.0
"""What operators and requests may ask for."""

from __future__ import annotations

import pytest

import vtprune
from vtprune.errors import BudgetError, ConfigError, UnsupportedStageError
from vtprune.serving.setting import UNSET, ServerSetting, method_of, spec_of
from vtprune.testing import families

HALF = {"name": "divprune", "keep_ratio": 0.5}


@pytest.fixture(scope="module")
def llava():
    return vtprune.adapter_for(families.shared("llava"))


@pytest.fixture(scope="module")
def qwen():
    return vtprune.adapter_for(families.shared("qwen2_5_vl"))


def test_a_spec_has_one_order():
    """Caches know a medium by it, so equal settings have to look alike."""
    assert list(spec_of({"keep_ratio": 0.5, "name": "divprune"})) == list(spec_of(HALF))
    assert spec_of("divprune") == {"name": "divprune"}


def test_a_request_overrides_the_server_and_may_opt_out():
    server = ServerSetting.of(HALF)
    assert server.asked(UNSET) == HALF
    assert server.asked({"name": "mmtok", "keep_tokens": 3}) == {"keep_tokens": 3, "name": "mmtok"}
    assert server.asked(None) is None
    assert ServerSetting.of(None).asked(UNSET) is None


def test_a_cap_is_the_operators():
    server = ServerSetting.of({**HALF, "max_keep_ratio": 0.5})
    assert server.default == HALF and server.max_keep_ratio == 0.5
    with pytest.raises(BudgetError, match="at most 50%"):
        server.asked(None)
    with pytest.raises(ConfigError, match="operator"):
        server.asked({**HALF, "max_keep_ratio": 1.0})


@pytest.mark.parametrize("cap", [0, 1.5, "half", True])
def test_a_cap_is_a_share(cap):
    with pytest.raises(ConfigError, match="max_keep_ratio"):
        ServerSetting.of({**HALF, "max_keep_ratio": cap})


def test_a_cap_needs_a_method():
    with pytest.raises(ConfigError, match="needs a method"):
        ServerSetting.of({"max_keep_ratio": 0.5})


@pytest.mark.parametrize("value", [3, ["divprune"], {"keep_ratio": 0.5}, {"name": 7}])
def test_what_names_no_method_is_refused(value):
    with pytest.raises(ConfigError, match="expected a method's name"):
        spec_of(value)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({"name": "fastv", "keep_ratio": 0.5}, UnsupportedStageError, "only methods before the LLM"),
        ({"name": "holitom", "keep_ratio": 0.5}, UnsupportedStageError, "only methods before the LLM"),
        ({"name": "tome", "keep_ratio": 0.5}, UnsupportedStageError, "only methods before the LLM"),
        ({"name": "divprune"}, BudgetError, "needs a budget"),
        ({"name": "nosuch", "keep_ratio": 0.5}, ConfigError, "nosuch"),
        ({"name": "divprune", "keep_ratio": 0.5, "positions": "original"}, UnsupportedStageError, "compact"),
        ({"name": "divprune", "keep_ratio": 0.5, "extra": {1, 2}}, ConfigError, "vtprune"),
        ({"name": "divprune", "keep_ratio": 0.5, "extra": 1}, ConfigError, "extra"),
        ({"name": "cdpruner", "keep_ratio": 0.5, "text_tower": "x"}, UnsupportedStageError, "last normalisation"),
    ],
)
def test_what_a_server_cannot_do_is_refused_by_name(llava, spec, error, message):
    with pytest.raises(error, match=message):
        method_of(spec_of(spec), llava)


def test_layers_of_the_encoder_are_read_of_clip_alone(llava, qwen):
    spec = spec_of({"name": "random", "keep_ratio": 0.5})
    assert method_of(spec, qwen).name == "random"
    saliency = spec_of({"name": "vispruner", "keep_ratio": 0.5})
    assert method_of(saliency, llava).name == "vispruner"
    with pytest.raises(UnsupportedStageError, match="CLIP and SigLIP towers only"):
        method_of(saliency, qwen)


def test_layers_behind_the_features_are_not_loaded(llava):
    deepest = llava.shape.feature_layer
    assert deepest + 1 < llava.shape.encoder_layers, "the test needs a layer that the projector does not read"
    spec = spec_of({"name": "recoverable", "keep_ratio": 0.5})
    with pytest.raises(UnsupportedStageError, match=f"layers 0..{deepest}"):
        method_of(spec, llava)
