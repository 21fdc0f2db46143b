# SPDX-License-Identifier: Apache-2.0
"""`check_adapter` passes the adapters of this library, and names what a wrong one states."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import vtprune
from vtprune import adapters
from vtprune.adapters import adapter_for
from vtprune.adapters.internvl import InternVL
from vtprune.adapters.llava import Llava
from vtprune.adapters.llava_next import LlavaNext
from vtprune.errors import ConfigError
from vtprune.testing import PromiseBroken, check_adapter, families

pytestmark = pytest.mark.usefixtures("one_thread")
SOME = ("llava", "llava_next", "qwen2_vl", "internvl")


def inputs_of(name: str, media: str = "image"):
    model = families.build(name)
    return model, families.batch(name, model, media=media)


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in families.NAMES]
)
def test_our_adapters_pass(name):
    model, batch = inputs_of(name)
    if name == "molmo2":  # places of patches are counted through a batch
        with pytest.raises(ConfigError, match="cannot be told which rows"):
            check_adapter(model, batch.inputs)
        return
    # Nobody can tell from the inputs of a batch which tiles, all in a row, are whose.
    alone = name in ("deepseek_ocr2", "unlimited_ocr", "perception_lm", "step3p7")
    results = check_adapter(model, batch.singles if alone else batch.inputs)
    adapter = adapter_for(model)
    refuses = adapter.carries_state or adapter.layers_unread or adapter.features_unread
    allowed = {"ok", "refused"} if refuses else {"ok"}
    assert {result.status for result in results} <= allowed and any(result.passed for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava_next_video", "llava_onevision", "qwen3_vl"])
@pytest.mark.parametrize("media", ["video", "mixed"])
def test_videos_pass(name, media):
    model, batch = inputs_of(name, media)
    assert check_adapter(model, batch.inputs)


def test_a_list_of_single_inputs_does_the_same():
    model, batch = inputs_of("llava_next")
    singles = [{key: x for key, x in single.items() if key != "attention_mask"} for single in batch.singles]
    assert [r.status for r in check_adapter(model, singles)] == [r.status for r in check_adapter(model, batch.inputs)]


class WrongCrops(LlavaNext):
    """Its grids have a row too many."""

    def media(self, kind, inputs, features):
        return [
            dataclasses.replace(m, grids=tuple(g and dataclasses.replace(g, rows=g.rows + 1) for g in m.grids))
            for m in super().media(kind, inputs, features)
        ]


class ShortMedia(Llava):
    def media(self, kind, inputs, features):
        return [vtprune.Medium.without_grid(len(image) - 1) for image in features]


class WrongId(Llava):
    visual_token_ids = {"image": 7}


class NoCls(Llava):
    has_cls = False


class OtherLayer(Llava):
    @property
    def shape(self):
        return dataclasses.replace(super().shape, feature_layer=super().shape.feature_layer + self.off)


class Deeper(OtherLayer):
    off = 1


class Shallower(OtherLayer):
    off = -1


class OutOfRange(OtherLayer):
    off = 9


class MoreLayers(Llava):
    @property
    def shape(self):
        return dataclasses.replace(super().shape, decoder_layers=40)


class Careless(InternVL):
    patch_values = vtprune.Adapter.patch_values


class Holes(Llava):
    def projector_inputs(self, kind, inputs, features):
        rows = super().projector_inputs(kind, inputs, features).clone()
        rows[3] = 0
        return rows


FAULTS = [
    (WrongCrops, "llava_next", "layout: FAILED.*image 0: crop 0 has 9 tokens and Grid"),
    (ShortMedia, "llava", r"layout: FAILED. measured 140, allowed 144.*lays out \[35, 35, 35, 35\]"),
    (WrongId, "llava", "layout: FAILED. measured 0, allowed 144.*0 columns hold the image id 7"),
    (NoCls, "llava", "encoder tokens: FAILED. measured 144, allowed 148"),
    (Deeper, "llava", "encoder layer: FAILED.*feature_layer is 3; the deepest that images need is none"),
    (Shallower, "llava", "encoder layer: FAILED.*feature_layer is 1; the deepest that images need is layer 2"),
    (OutOfRange, "llava", r"shape: FAILED.*of layers 0\.\.3"),
    (MoreLayers, "llava", "shape: FAILED. measured 40, allowed 8"),
    (Careless, "internvl", "encoder rows: error. VTPruneError: the adapter Careless gives"),
    (Holes, "llava", "encoder rows: FAILED. measured 1, allowed 0.*EncoderFeatures: 1 visual tokens"),
]


@pytest.mark.parametrize(("adapter", "name", "words"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_what_is_not_so_is_named(monkeypatch, adapter, name, words):
    model, batch = inputs_of(name)
    monkeypatch.setitem(adapters._ADAPTERS, model.config.model_type, adapter)
    with pytest.raises(PromiseBroken, match=f"{adapter.__name__} on {type(model).__name__}, {words}"):
        check_adapter(model, batch.inputs)


def test_wrong_attention_of_the_encoder_is_named(monkeypatch):
    """A projection that the library does not see scales the queries."""
    import vtprune.stages.encoder as stage

    rows = stage.attention_rows
    monkeypatch.setattr(stage, "attention_rows", lambda q, k, *, scale, mask: rows(q, k, scale=2 * scale, mask=mask))
    model, batch = inputs_of("llava")
    with pytest.raises(PromiseBroken, match="encoder attention: FAILED.*encoder layer 2"):
        check_adapter(model, batch.inputs)


def test_features_that_change_on_the_way_are_named():
    model, batch = inputs_of("llava")

    def hook(module, args, kwargs):
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"] * 1.5}

    model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(PromiseBroken, match="features: FAILED. measured"):
        check_adapter(model, batch.inputs)


def test_promises_are_checked_when_the_statements_hold():
    from . import broken

    model, batch = inputs_of("llava")
    broken.ignores_padding(model)
    with pytest.raises(PromiseBroken, match="batch, divprune: FAILED. measured"):
        check_adapter(model, batch.inputs)


def test_inputs_that_show_nothing_are_errors():
    model, batch = inputs_of("llava")
    for wrong in (batch.singles[0], batch.singles[:1], [], families.batch("llava", model, padding_side="right").inputs):
        with pytest.raises(vtprune.ConfigError, match="two samples or more, of different lengths, padded on the left"):
            check_adapter(model, wrong)
    with pytest.raises(vtprune.UnsupportedModelError):
        check_adapter(torch.nn.Linear(1, 1), batch.inputs)
