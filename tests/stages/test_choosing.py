# SPDX-License-Identifier: Apache-2.0
"""The FLOPs of choices, on a tiny LLaVA (36 visual tokens an image, a CLS token) and a tiny CLIP."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from encoders import hosts
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vtprune
from vtprune.errors import ConfigError
from vtprune.methods.in_layers import InLayers
from vtprune.stages.choosing import counting
from vtprune.testing import families
from vtprune.tokens import Selection


@pytest.fixture(autouse=True)
def _fast(one_thread):
    with torch.no_grad():
        yield


def model():
    return families.shared("llava")


def batch():
    """Prompts of one, two and one images."""
    return families.batch("llava", model(), samples=3)


def single():
    """A prompt of one image."""
    return dict(batch().singles[0])


# -- what is counted ----------------------------------------------------------------------------------------------


def products():
    """3 * 4 * 5 multiply-adds of a layer, and 6 * 5 * 4 * 5 of a batched product."""
    nn.Linear(4, 5)(torch.ones(3, 4))
    torch.ones(6, 5, 4) @ torch.ones(6, 4, 5)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_two_for_each_multiply_add_as_torch_counts_them(mode):
    expected = 2 * (3 * 4 * 5 + 6 * 5 * 4 * 5)
    into = SimpleNamespace(selection_flops=0)
    with mode(), FlopCounterMode(display=False) as counter:
        for times in (1, 2):
            with counting(into, "flops"):
                products()
            assert into.selection_flops == times * expected
        products()
    assert counter.get_total_flops() == 3 * expected, "who counts around it still sees everything"


@pytest.mark.parametrize("profile", [False, True])
def test_nothing_is_counted_unasked(profile):
    into = SimpleNamespace(selection_flops=0)
    with counting(into, profile):
        products()
    assert into.selection_flops == 0


def test_counting_puts_no_hooks_on_the_modules_of_all_threads(monkeypatch):
    def refuse(hook):
        raise AssertionError("a hook on every module")

    for name in ("register_module_forward_pre_hook", "register_module_forward_hook"):
        monkeypatch.setattr(f"torch.utils.module_tracker.{name}", refuse)
    with pytest.raises(AssertionError, match="every module"), FlopCounterMode(display=False):
        products()  # so the hooks that are refused are those of torch's own counter
    with counting(SimpleNamespace(selection_flops=0), "flops"):
        products()


# -- which choices are counted ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Multiplying:
    """Mixed into the class of a stage: keeps the first tokens of a group, and multiplies all features by a matrix."""

    signal: ClassVar[str] = "-"
    needs_budget: ClassVar[bool] = False

    keeps: int
    columns: int

    def select(self, tokens):
        tokens.features @ tokens.features.new_ones(tokens.features.shape[-1], self.columns)
        return Selection(tokens.valid & (tokens.valid.cumsum(1) <= self.keeps))


class InTheEncoder(Multiplying, vtprune.InEncoder):
    name: ClassVar[str] = "in_the_encoder"

    def cuts(self, shape):
        return (1,)

    def budgets(self, lengths):
        return torch.full_like(lengths, -1)


class BeforeTheLLM(Multiplying, vtprune.BeforeLLM):
    name: ClassVar[str] = "before_the_llm"


class InTheLLM(Multiplying, vtprune.InLLM):
    name: ClassVar[str] = "in_the_llm"

    def cuts(self, shape):
        return (2,)

    def budgets(self, shape, entering, crops):
        return torch.full((1, len(entering)), -1)


class FromTheCache(Multiplying, vtprune.AfterPrefill):
    name: ClassVar[str] = "from_the_cache"

    def layers(self, shape):
        return (3, 4)


@dataclass(frozen=True, kw_only=True)
class Everywhere(vtprune.Composite):
    """Chooses at every stage. Each stage has a share of the FLOPs that no sum of the others has."""

    name: ClassVar[str] = "everywhere"
    signal: ClassVar[str] = "-"
    needs_budget: ClassVar[bool] = False

    def parts(self, shape):
        return (
            InTheEncoder(keeps=30, columns=1),
            BeforeTheLLM(keeps=20, columns=10),
            InTheLLM(keeps=10, columns=100),
            FromTheCache(keeps=5, columns=1000),
        )


def flops_of_everywhere(images: int, samples: int, widest: int, evicts: bool = True) -> int:
    """widest: most images of a sample."""
    config = model().config
    vision, text = config.vision_config.hidden_size, config.text_config.hidden_size
    keys = config.text_config.num_key_value_heads * config.text_config.head_dim
    in_encoder, before = images * 36 * vision * 1, images * 30 * text * 10
    inside, evicted = samples * 20 * widest * text * 100, evicts * 2 * samples * 10 * keys * 1000
    return 2 * (in_encoder + before + inside + evicted)


def test_the_choices_of_every_stage_are_counted_for_each_prefill_anew():
    with vtprune.prune(model(), Everywhere(), profile="flops") as session:
        for _ in range(2):
            model()(**single())
            assert session.report.selection_flops == flops_of_everywhere(1, 1, 1)
        model()(**batch().inputs)
        report = session.report
    assert report.cached(0, 3).tolist() == report.kept(0)[:5].tolist() and report.cached(0, 5).shape == (10,)
    assert report.selection_flops == flops_of_everywhere(4, 3, 2)
    assert report.to_dict()["selection_flops"] == report.selection_flops
    (line,) = (line for line in str(report).splitlines() if "selection GFLOPs" in line)
    assert line.split()[2:] == ["0", f"{report.selection_flops / 1e9:.4g}", "-"]


def test_tokens_that_are_generated_repeat_the_choices_of_the_prefill():
    parts = list(Everywhere().parts(None)[:3])
    with vtprune.prune(model(), parts, profile="flops") as session:
        for options in ({}, {"use_cache": False}):
            model().generate(**single(), max_new_tokens=3, **options)
            assert session.report.selection_flops == flops_of_everywhere(1, 1, 1, evicts=False)
            assert session.totals.prefills == 1 + bool(options)


def test_choices_in_the_encoder_count_for_each_prefill_that_reads_them():
    inputs = single()
    with vtprune.prune(model(), InTheEncoder(keeps=30, columns=1), profile="flops") as session:
        encoded = model().model.get_image_features(inputs.pop("pixel_values"))
        for _ in range(2):
            model()(**inputs, mm_encoder_outputs={"image": encoded})
            assert session.report.selection_flops == 2 * 36 * model().config.vision_config.hidden_size


@contextmanager
def counted_by_hand(methods, shape):
    """The FLOPs of each choice, by torch's counter around the methods' own functions."""
    found = []

    def within(choose):
        @wraps(choose)
        def counted(*args):
            with FlopCounterMode(display=False) as counter:
                chosen = choose(*args)
            found.append(counter.get_total_flops())
            return chosen

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for cls in {type(part) for method in methods for part in method.parts(shape)}:
            for name in ("reduce", "attention_behind") if issubclass(cls, InLayers) else ("choose",):
                patch.setattr(cls, name, within(getattr(cls, name)))
        yield found


TOME = {"name": "tome", "keep_ratio": 0.6}
TRANSPRUNE = {"name": "transprune", "keep_ratio": 0.5}


@pytest.mark.parametrize(
    "method",
    [
        TOME,
        {"name": "mctf", "keep_ratio": 0.6},
        {"name": "mctf", "keep_ratio": 0.6, "one_step_ahead": 0},
        {"name": "divprune", "keep_ratio": 0.3},
        {"name": "fastv", "keep_ratio": 0.5},
        TRANSPRUNE,
        [TOME, TRANSPRUNE],
        {"name": "aim", "keep_ratio": 0.4},
        {"name": "mustdrop", "keep_ratio": 0.3},
    ],
    ids=str,
)
def test_what_methods_of_each_stage_compute(method):
    inputs = batch().inputs
    with vtprune.prune(model(), method) as session, counted_by_hand(session.methods, session.adapter.shape) as found:
        model()(**inputs)
    assert session.report.selection_flops is None and "selection" not in str(session.report)
    with vtprune.prune(model(), method, profile="flops") as session:
        model()(**inputs)
    assert session.report.selection_flops == sum(found) > 0
    assert session.report.timings is None


def test_text_alone_needs_no_choice():
    text = {"input_ids": torch.arange(2, 7)[None], "attention_mask": torch.ones(1, 5)}
    for profile, expected in (("flops", 0), (True, None), (False, None)):
        with vtprune.prune(model(), "divprune", keep_ratio=0.3, profile=profile) as session:
            model()(**text)
        assert session.report.selection_flops == expected


# -- threads ------------------------------------------------------------------------------------------------------

MEETING = threading.Barrier(2)


class Meeting(BeforeTheLLM):
    """Chooses while the other thread does."""

    name: ClassVar[str] = "meeting"

    def select(self, tokens):
        MEETING.wait(timeout=60)
        selection = super().select(tokens)
        MEETING.wait(timeout=60)
        return selection


def test_each_thread_counts_its_own_choices():
    def flops(inputs):
        with torch.no_grad():
            model()(**inputs)
        return session.report.selection_flops

    prompts, method = [single(), batch().inputs], Meeting(keeps=20, columns=7)
    with vtprune.prune(model(), method, profile="flops") as session, ThreadPoolExecutor(2) as pool:
        found = list(pool.map(flops, prompts))
    one_image = 2 * 36 * model().config.text_config.hidden_size * 7
    assert found == [one_image, 4 * one_image]


# -- a vision encoder alone ---------------------------------------------------------------------------------------


def test_tome_compares_every_second_token_with_the_others():
    with vtprune.prune(hosts.shared("clip"), "tome", r=3, profile="flops") as session:
        for images in (2, 1):
            hosts.encode(hosts.shared("clip"), hosts.pixels(images))
            # Four layers merge three each: similarities in the width of a head, which is 8.
            expected = 2 * images * 8 * (19 * 18 + 17 * 17 + 16 * 15 + 14 * 14)
            assert session.report.selection_flops == session.report.to_dict()["selection_flops"] == expected
    assert str(session.report).splitlines()[-2].split() == ["selection", "GFLOPs", "0", f"{expected / 1e9:.4g}", "-"]


@pytest.mark.parametrize("name", ["mctf", "zero_tprune"])
def test_what_methods_of_an_encoder_compute(name):
    images = hosts.pixels()
    session = vtprune.prune(hosts.shared("clip"), name, keep_ratio=0.6)
    with session, counted_by_hand(session.methods, session.adapter.shape) as found:
        hosts.encode(hosts.shared("clip"), images)
    assert session.report.selection_flops is None and "selection" not in str(session.report)
    with vtprune.prune(hosts.shared("clip"), name, keep_ratio=0.6, profile="flops") as session:
        hosts.encode(hosts.shared("clip"), images)
    assert session.report.selection_flops == sum(found) > 0


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["times", 1, None])
def test_what_cannot_be_measured_is_refused(profile):
    for subject, method in ((model(), "divprune"), (hosts.shared("clip"), "tome")):
        with pytest.raises(ConfigError, match=f"profile={profile!r}: expected False, True .* or 'flops'"):
            vtprune.prune(subject, method, keep_ratio=0.5, profile=profile)


def test_an_encoder_alone_is_not_timed():
    with pytest.raises(ConfigError, match="vision encoder alone; profile='flops' counts"):
        vtprune.prune(hosts.shared("clip"), "tome", r=3, profile=True)
