# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import vtprune
from vtprune.errors import ConfigError, UnsupportedStageError
from vtprune.methods.lazyllm import LazyLLM
from vtprune.methods.mustdrop import AliveInLastLayer
from vtprune.signals import (
    AttentionReceived,
    ClsAttention,
    EncoderFeatures,
    EncoderKeys,
    EncoderOutput,
    EncoderSignal,
    InstructionAttention,
    LastQueryAttention,
    LayerSignal,
    SampleKeys,
)
from vtprune.stages.layout import Groups
from vtprune.stages.reading import check_family, check_signals, signal_reader, visual_tokens

from .hand_made import SHAPE, Scripted, ScriptedBefore, ScriptedInside, adapter


@dataclass(frozen=True, kw_only=True)
class After(Scripted, vtprune.AfterPrefill):
    name: ClassVar[str] = "after"

    def layers(self, shape):
        return (0,)


@dataclass(frozen=True, kw_only=True)
class InsideEncoder(Scripted, vtprune.InEncoder):
    name: ClassVar[str] = "inside_encoder"

    def cuts(self, shape):
        return (0,)

    def budgets(self, lengths):
        return torch.full_like(lengths, -1)


@pytest.mark.parametrize(
    "signal, unread",
    [
        (EncoderFeatures(), {"features_unread": "it resamples", "layers_unread": ""}),
        (ClsAttention((0,)), {"layers_unread": "it has none", "features_unread": ""}),
        (AttentionReceived(0), {"layers_unread": "it has none", "features_unread": ""}),
        (EncoderOutput(0), {"layers_unread": "it has none", "features_unread": ""}),
        (EncoderKeys(0), {"layers_unread": "it has none", "features_unread": ""}),
    ],
)
def test_what_an_adapter_says_cannot_be_read_is_refused(signal, unread):
    method = ScriptedBefore(requests=(signal,))
    words = "|".join(filter(None, unread.values()))
    name = (
        f"scripted_before: {type(signal).__name__} cannot be read of the vision encoder of Odd: ({words}); .*divprune"
    )
    with pytest.raises(UnsupportedStageError, match=name):
        check_family(method, adapter(family="Odd", **unread))
    check_family(method, adapter(family="Odd", layers_unread="", features_unread=""))
    other = {key: "" if value else "never mind" for key, value in unread.items()}
    check_family(method, adapter(family="Odd", **other))


def test_methods_that_go_by_rows_and_columns_are_refused_where_there_are_none():
    pool = vtprune.Pool(keep_ratio=0.5)
    with pytest.raises(UnsupportedStageError, match="pool goes by rows.* of Odd have none: it resamples; .*divprune"):
        check_family(pool, adapter(family="Odd", gridless="it resamples", layers_unread="", features_unread=""))
    check_family(pool, adapter(family="Odd", gridless="", layers_unread="", features_unread=""))


@dataclass(frozen=True)
class Measured(LayerSignal):
    layers: tuple[int, ...]

    def measures(self):
        return self.layers

    def measure(self, inputs, outputs, counted):
        return counted.float()

    def read_layer(self, view):
        raise AssertionError("a check read the signal")


class Unmeasured(Measured):
    measure = LayerSignal.measure


@pytest.mark.parametrize(
    "method",
    [
        ScriptedBefore(requests=(EncoderFeatures(), ClsAttention((0,)), SampleKeys())),
        ScriptedInside(requests=(LastQueryAttention(1), InstructionAttention(), SampleKeys(), Measured((0, 1)))),
        ScriptedInside(requests=(ClsAttention((2,)),)),  # recorded for a signal that reads it inside the LLM
        After(requests=(AliveInLastLayer(),)),
        InsideEncoder(),
    ],
)
def test_signals_at_their_own_stage_are_accepted(method):
    check_signals(method, SHAPE)


@pytest.mark.parametrize(
    "method, where",
    [
        (ScriptedBefore(requests=(LastQueryAttention(0),)), "before the LLM"),
        (ScriptedInside(requests=(AliveInLastLayer(),)), "inside the LLM"),
        (After(requests=(LastQueryAttention(0),)), "after the prefill"),
        (After(requests=(EncoderFeatures(),)), "after the prefill"),
        (InsideEncoder(requests=(EncoderFeatures(),)), "inside the vision encoder"),
    ],
)
def test_signals_of_another_stage_are_refused(method, where):
    with pytest.raises(UnsupportedStageError, match=f"{method.name}: .* cannot be read {where}"):
        check_signals(method, SHAPE)


def test_what_is_no_signal_is_refused():
    with pytest.raises(ConfigError, match="str is no signal"):
        check_signals(ScriptedBefore(requests=("attention",)), SHAPE)


def test_attention_of_a_cls_token_needs_one():
    for method in (ScriptedBefore, ScriptedInside):
        with pytest.raises(UnsupportedStageError, match="ClsAttention needs a CLS token"):
            check_signals(method(requests=(ClsAttention((0,)),)), replace(SHAPE, has_cls=False))


@pytest.mark.parametrize("signal", [LastQueryAttention(2), Measured((0, 2))])
def test_layers_that_have_not_run_by_the_last_cut_are_refused(signal):
    with pytest.raises(ConfigError, match=r"reads decoder layer 2, and the cuts are on the input of layers \(2,\)"):
        check_signals(ScriptedInside(requests=(signal,)), SHAPE)
    check_signals(ScriptedInside(requests=(signal,), layers=(2, 3)), SHAPE)


def test_layers_count_from_the_first_one():
    with pytest.raises(ConfigError, match="reads decoder layer -1"):
        check_signals(ScriptedInside(requests=(LastQueryAttention(-1),)), SHAPE)


def test_layers_are_measured_by_a_signal_that_measures():
    with pytest.raises(ConfigError, match="does not override `measure`"):
        check_signals(ScriptedInside(requests=(Unmeasured((0,)),)), SHAPE)


def test_only_the_last_query_is_read_while_tokens_are_generated():
    class Greedy(LazyLLM):
        name = "greedy"

        def signals(self, shape):
            return (InstructionAttention(),)

    options = {"layers": (1, 2), "schedule": (0.5, 0.5)}
    check_signals(LazyLLM(**options), SHAPE)
    with pytest.raises(UnsupportedStageError, match="cannot be read while tokens are generated"):
        check_signals(Greedy(**options), SHAPE)


# -- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number(EncoderSignal):
    value: int

    def read_encoded(self, view):
        raise AssertionError


def test_only_listed_signals_are_read_and_only_when_looked_up():
    asked = []
    method = ScriptedBefore(requests=(Number(1), Number(2)))
    look_up = signal_reader(method, SHAPE, lambda signal: asked.append(signal) or signal.value, torch.device("cpu"))
    assert not asked
    assert look_up(Number(2)) == 2 and asked == [Number(2)]
    with pytest.raises(ConfigError, match="scripted_before reads Number.value=3., which its `signals` does not list"):
        look_up(Number(3))
    assert asked == [Number(2)]


def test_tensors_within_what_is_read_are_moved_and_the_rest_is_not():
    read = {1: torch.ones(2), 2: [torch.ones(1), "text"], 3: (torch.ones(1), [torch.ones(1)]), 4: [7, 8]}
    method = ScriptedBefore(requests=tuple(map(Number, read)))
    look_up = signal_reader(method, SHAPE, lambda signal: read[signal.value], torch.device("meta"))
    assert look_up(Number(1)).device.type == "meta"
    tensor, text = look_up(Number(2))
    assert isinstance(look_up(Number(2)), list) and tensor.device.type == "meta" and text == "text"
    first, (second,) = look_up(Number(3))
    assert isinstance(look_up(Number(3)), tuple) and first.device.type == second.device.type == "meta"
    assert look_up(Number(4)) == [7, 8]


def test_everything_a_method_is_shown_is_where_the_features_are():
    labels = torch.tensor([[0, 0, -1], [-1, 1, -1]])
    groups = Groups.of_labels(labels, torch.tensor([0, 1]), torch.tensor([0, 1]))
    tokens = visual_tokens(
        ScriptedBefore(requests=(Number(1),)),
        SHAPE,
        groups,
        torch.zeros(2, 2, 4, device="meta"),
        lambda signal: torch.ones(2, 2),
        budget=torch.tensor([1, 1]),
        layer=3,
        kinds=("image", "video"),
    )
    assert {x.device.type for x in (tokens.features, tokens.valid, tokens.budget, tokens[Number(1)])} == {"meta"}
    assert tokens.layer == 3 and tokens.kinds == ("image", "video") and tokens.shape is SHAPE and tokens.crops is None


def test_a_method_is_shown_which_tokens_are_real():
    labels = torch.tensor([[0, 0, -1], [-1, 1, -1]])
    groups = Groups.of_labels(labels, torch.tensor([0, 1]), torch.tensor([0, 1]))
    tokens = visual_tokens(ScriptedBefore(), SHAPE, groups, torch.zeros(2, 2, 4), None, budget=torch.tensor([1, 1]))
    assert tokens.valid.tolist() == [[True, True], [True, False]]
