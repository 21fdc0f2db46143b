# SPDX-License-Identifier: Apache-2.0
"""Methods with their own signals, in one file, at every stage; and refusals by name when a session opens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vtprune
from vtprune.errors import ConfigError, UnsupportedStageError, VTPruneError
from vtprune.signals import (
    CacheSignal,
    ClsAttention,
    EncoderKeys,
    EncoderSignal,
    LastQueryAttention,
    LayerSignal,
    Taps,
    TextEmbeddings,
)
from vtprune.testing import families
from vtprune.tokens import Selection

SEEN: dict = {}


@pytest.fixture(autouse=True)
def _fresh():
    SEEN.clear()
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class StateNorm(LayerSignal):
    """(groups, tokens): length of the states at the layer's input."""

    def read_layer(self, view):
        return view.groups.gather(view.hidden.norm(dim=-1))


@dataclass(frozen=True)
class Growth(LayerSignal):
    """(groups, tokens): how much longer blocks made each token, summed over the first layers; and what was marked."""

    layers: tuple[int, ...] = (0, 1)

    def measures(self):
        return self.layers

    def measure(self, inputs, outputs, counted):
        return (outputs.norm(dim=-1) - inputs.norm(dim=-1)).masked_fill(~counted, 0)

    def mark(self, view):
        return view.real & (view.hidden[..., 0] > 0)

    def read_layer(self, view):
        return view.groups.gather(view.measured(self)), view.groups.gather(view.marked(self))


@dataclass(frozen=True)
class KeyLength(LayerSignal):
    """(groups, tokens): length of the keys two layers before."""

    def attends(self, cut):
        return (cut - 2,)

    def read_layer(self, view):
        return view.groups.gather(view.attention(view.layer - 2).keys().float().norm(dim=-1).sum(1))


@dataclass(frozen=True)
class OutputNorm(EncoderSignal):
    """(groups, tokens): length of the first encoder layer's output."""

    def taps(self, shape):
        return Taps(outputs=(0,))

    def read_encoded(self, view):
        return view.per_token(lambda record: record.outputs[0].norm(dim=-1, keepdim=True))[..., 0]


@dataclass(frozen=True)
class AliveInTheMiddle(CacheSignal):
    """(groups, tokens) bool."""

    def read_cache(self, view):
        return view.alive(3)


@dataclass(frozen=True, kw_only=True)
class Inside(vtprune.CutOnce):
    name: ClassVar[str] = "inside"
    signal: ClassVar[str] = "signals of its own"

    share: float = 0.5
    asks: tuple = (StateNorm(), Growth(), KeyLength())

    def signals(self, shape):
        return self.asks

    def scores(self, tokens):
        SEEN.update({signal: tokens[signal] for signal in self.asks}, features=tokens.features)
        return tokens[StateNorm()] if StateNorm() in self.asks else tokens.features[..., 0]


@dataclass(frozen=True, kw_only=True)
class Before(vtprune.BeforeLLM):
    name: ClassVar[str] = "before"
    signal: ClassVar[str] = "a signal of its own"

    asks: tuple = (OutputNorm(),)

    def signals(self, shape):
        return self.asks

    def scores(self, tokens):
        return tokens[OutputNorm()]


@dataclass(frozen=True, kw_only=True)
class After(vtprune.AfterPrefill):
    name: ClassVar[str] = "after"
    signal: ClassVar[str] = "a signal of its own"
    needs_budget: ClassVar[bool] = False

    asks: tuple = (AliveInTheMiddle(),)

    def layers(self, shape):
        return (0, 1)

    def signals(self, shape):
        return self.asks

    def select(self, tokens):
        return Selection(tokens[AliveInTheMiddle()])


@dataclass(frozen=True, kw_only=True)
class InTheEncoder(vtprune.InEncoder):
    name: ClassVar[str] = "in_the_encoder"
    signal: ClassVar[str] = "-"
    needs_budget: ClassVar[bool] = False

    def cuts(self, shape):
        return (0,)

    def budgets(self, lengths):
        return torch.full_like(lengths, -1)

    def signals(self, shape):
        return (OutputNorm(),)

    def select(self, tokens):
        return Selection(tokens.valid)


@pytest.mark.parametrize("name", families.PRUNED_INSIDE)
def test_a_signal_inside_the_llm(name):
    """A signal equals what hooks of the test see, and the best tokens by it stay; single prompts and a padded batch."""
    model = families.shared(name)
    batch = families.batch(name, model)
    seen: dict = {}

    def note(module, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        after = (output[0] if isinstance(output, tuple) else output).view_as(before)
        seen["growth"] = seen.get("growth", 0) + after.norm(dim=-1) - before.norm(dim=-1)

    def enter(module, args, kwargs):
        seen["first"] = adapter.token_states(args[0] if args else kwargs["hidden_states"])

    adapter = vtprune.adapter_for(model)
    layers = adapter.decoder_layers
    handles = [layers[0].register_forward_pre_hook(enter, with_kwargs=True)]
    for layer in layers[:2]:
        for block in (layer.self_attn, getattr(layer, adapter.decoder_mlp)):
            handles.append(block.register_forward_hook(note, with_kwargs=True))
    for inputs in (batch.singles[0], batch.inputs):
        seen.clear()
        with vtprune.prune(model, Inside(layer=2, share=0.5)) as session:
            model(**inputs)
        report = session.report
        norms, (growth, marked) = SEEN[StateNorm()], SEEN[Growth()]
        torch.testing.assert_close(norms, SEEN["features"].norm(dim=-1))
        assert SEEN[KeyLength()].shape == norms.shape and (SEEN[KeyLength()][norms > 0] > 0).all()
        for row, columns in enumerate(report.visual):
            count = int((norms[row] > 0).sum())
            if count < len(columns):
                continue  # the others are newline tokens, which belong to no group
            kept, scores = report.kept(row, 2), norms[row, :count]
            assert torch.equal(kept, columns[scores.topk(len(kept)).indices.sort().values])
            torch.testing.assert_close(growth[row, :count], seen["growth"][row, columns])
            assert torch.equal(marked[row, :count] > 0, seen["first"][row, columns, 0] > 0)
    for handle in handles:
        handle.remove()


def test_signals_before_the_llm_and_after_the_prefill():
    model = families.shared("llava")
    batch = families.batch("llava", model)
    outputs: list = []
    handle = (
        vtprune.adapter_for(model)
        .encoder_layers()[0]
        .register_forward_hook(lambda m, args, output: outputs.append(output))
    )
    with vtprune.prune(model, Before(keep_ratio=0.5)) as session:
        model(**batch.inputs)
    handle.remove()
    output = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    lengths = output[:, 1:].norm(dim=-1)
    crop = 0
    for row, columns in enumerate(session.report.visual):
        for part in columns.split(lengths.shape[1]):
            best = lengths[crop].topk(len(part) // 2).indices.sort().values
            kept = session.report.kept(row)
            assert kept[torch.isin(kept, part)].tolist() == part[best].tolist()
            crop += 1
    with vtprune.prune(model, [Inside(layer=2, share=0.5, asks=()), After()]) as session:
        model(**batch.inputs)
    for row in range(session.report.samples):
        assert torch.equal(session.report.cached(row, 0), session.report.kept(row, 3))
        assert len(session.report.kept(row, 0)) > len(session.report.kept(row, 3))


HALF = {"keep_ratio": 0.5}
REFUSED = [
    (Before(**HALF, asks=(LastQueryAttention(1),)), "before: LastQueryAttention cannot be read before the LLM"),
    (Inside(asks=(AliveInTheMiddle(),)), "inside: AliveInTheMiddle cannot be read inside the LLM"),
    (After(asks=(TextEmbeddings(),)), "after: TextEmbeddings cannot be read after the prefill"),
    (InTheEncoder(), "in_the_encoder: OutputNorm cannot be read inside the vision encoder"),
]
MISTAKEN = [
    (Inside(asks=(LastQueryAttention(5),), layer=3), "inside: LastQueryAttention reads decoder layer 5, and the cuts"),
    (Inside(asks=(LastQueryAttention(3),), layer=3), "inside: LastQueryAttention reads decoder layer 3, and the cuts"),
    (Inside(asks=(Growth((9,)),), layer=3), "inside: Growth reads decoder layer 9"),
    (Before(**HALF, asks=("attention",)), "before: str is no signal"),
    (Before(**HALF, asks=(EncoderKeys(40),)), "reads encoder layer 40, and the vision encoder has layers 0"),
]


@pytest.mark.parametrize(
    ("method", "error", "words"),
    [(method, UnsupportedStageError, words) for method, words in REFUSED]
    + [(method, ConfigError, words) for method, words in MISTAKEN],
)
def test_what_cannot_be_read_is_an_error_when_the_session_opens(method, error, words):
    with pytest.raises(error, match=words):
        vtprune.prune(families.shared("llava"), method)


def test_a_measure_that_is_missing_is_an_error_when_the_session_opens():
    @dataclass(frozen=True)
    class Unmeasured(LayerSignal):
        def measures(self):
            return (0,)

        def read_layer(self, view):
            return view.groups.gather(view.measured(self))

    with pytest.raises(ConfigError, match="Unmeasured lists layers in `measures`, and does not override `measure`"):
        vtprune.prune(families.shared("llava"), Inside(asks=(Unmeasured(),), layer=3))


def test_cls_attention_needs_a_cls_token():
    name = next(name for name in families.NAMES if not vtprune.adapter_for(families.shared(name)).shape.has_cls)
    with pytest.raises(UnsupportedStageError, match="before: ClsAttention needs a CLS token"):
        vtprune.prune(families.shared(name), Before(keep_ratio=0.5, asks=(ClsAttention((1,)),)))


def test_what_is_not_listed_is_an_error_by_name():
    model = families.shared("llava")
    inputs = families.batch("llava", model).inputs
    with (
        vtprune.prune(model, Before(keep_ratio=0.5, asks=())),
        pytest.raises(ConfigError, match=r"before reads OutputNorm\(\), which its `signals` does not list"),
    ):
        model(**inputs)

    class Curious(InTheEncoder):
        def signals(self, shape):
            return ()

        def select(self, tokens):
            return Selection(tokens[OutputNorm()] > 0)

    with (
        vtprune.prune(model, Curious()),
        pytest.raises(ConfigError, match=r"in_the_encoder reads OutputNorm\(\), which its `signals` does not list"),
    ):
        model(**inputs)

    @dataclass(frozen=True)
    class Unstated(LayerSignal):
        def read_layer(self, view):
            return view.attention(1).keys()

    with (
        vtprune.prune(model, Inside(asks=(Unstated(),), layer=3)),
        pytest.raises(UnsupportedStageError, match="decoder layer 1 was not kept for the cut .* layer 3; .*`attends`"),
    ):
        model(**inputs)


# -- what a method returns ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Wrong(vtprune.BeforeLLM):
    name: ClassVar[str] = "wrong"
    signal: ClassVar[str] = "-"

    how: str = "too many"

    def scores(self, tokens):
        return tokens.features[..., 0] * float("nan") if self.how == "nan" else tokens.features[..., 0, None]

    def select(self, tokens):
        if self.how in ("nan", "scores"):
            return super().select(tokens)
        return {
            "too many": Selection(tokens.valid),
            "none": Selection(torch.zeros_like(tokens.valid)),
            "a tensor": tokens.valid,
            "integers": Selection(tokens.valid.long()),
            "features": Selection(tokens.valid, tokens.features[..., 1:]),
        }[self.how]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("too many", "wrong kept 36 of 36 tokens where 18 were to be kept"),
        ("none", "wrong kept 0 of 36 tokens where 18"),
        ("a tensor", "wrong returned a Tensor, expected a vtprune.Selection"),
        ("integers", r"wrong returned a selection of torch.int64 .* expected torch.bool"),
        ("features", "wrong returned features of"),
        ("nan", "wrong returned scores that are NaN"),
        ("scores", "wrong returned scores of"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_the_method(how, words):
    model = families.shared("llava")
    with vtprune.prune(model, Wrong(keep_ratio=0.5, how=how)), pytest.raises(VTPruneError, match=words):
        model(**families.batch("llava", model).inputs)


@pytest.mark.parametrize(
    "bases", [(vtprune.Scorer, vtprune.BeforeLLM), (vtprune.BeforeLLM, vtprune.Scorer), (vtprune.BeforeLLM,)]
)
def test_bases_stand_in_any_order(bases):
    method = dataclass(frozen=True, kw_only=True)(
        type("Length", bases, {"name": "length", "signal": "-", "scores": lambda self, t: t.features.norm(dim=-1)})
    )
    model = families.shared("llava")
    with vtprune.prune(model, method(keep_ratio=0.5)) as session:
        model(**families.batch("llava", model).inputs)
    assert session.report.keep_ratio == pytest.approx(0.5, abs=0.02)


def test_a_method_without_scores_or_select_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Nothing(vtprune.BeforeLLM):
        name: ClassVar[str] = "nothing"
        signal: ClassVar[str] = "-"

    with pytest.raises(ConfigError, match="nothing: a method gives every token a score in `scores`, or chooses"):
        Nothing(keep_ratio=0.5)
