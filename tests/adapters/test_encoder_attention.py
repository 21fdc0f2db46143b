# SPDX-License-Identifier: Apache-2.0
"""What signals read of the vision encoder is what its own eager code computes, in every layer of every tower: packed
images, windows, masked padding, queries and keys of one projection, rotations."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtprune
from vtprune.adapters.pixtral import Pixtral
from vtprune.signals import AttentionReceived, ClsAttention, EncoderKeys, EncoderOutput, EncoderSaliency, EncoderSignal
from vtprune.testing import families
from vtprune.testing.batching import encode_all
from vtprune.testing.statements import Look, cls_first, received
from vtprune.transformers_private import eager_encoder_attention

CELLS = [(name, media) for name in families.NAMES for media in families.MEDIA[name]]
PACKED = ["pixtral", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_5_omni", "idefics3", "smolvlm"]
pytestmark = pytest.mark.usefixtures("one_thread")


def skip_unread(adapter):
    if adapter.layers_unread:
        pytest.skip(f"nothing can be read there: {adapter.layers_unread}")


@torch.no_grad()
@pytest.mark.release
@pytest.mark.parametrize(("name", "media"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_attention_of_every_layer(name, media):
    model = families.shared(name, "eager")
    inputs = families.batch(name, model, media=media).inputs
    adapter = vtprune.adapter_for(model)
    skip_unread(adapter)
    look = Look(adapter, inputs)
    layers, has_cls = range(adapter.shape.encoder_layers), adapter.shape.has_cls
    expected: dict[EncoderSignal, list[Tensor]] = {AttentionReceived(layer): [] for layer in layers}
    expected |= {EncoderSaliency(layer): [] for layer in layers}
    if has_cls:
        expected |= {ClsAttention((layer,)): [] for layer in layers}
    for kind in adapter.visual_token_ids:
        with contextlib.ExitStack() as stack:
            attentions = [adapter.encoder_attention(layer) for layer in adapter.encoder_layers(kind)]
            found = [stack.enter_context(eager_encoder_attention(attention)) for attention in attentions]
            encoded = next(iter(encode_all(adapter, inputs, kind)), None)
        for layer, calls in enumerate(found if encoded is not None else ()):
            calls = [(cls_first(adapter, weights, -2, -1), mask) for weights, mask in calls]
            gets = torch.cat([received(*call) for call in calls], 1)
            expected[AttentionReceived(layer)].append(look.rows(encoded, gets[..., None])[:, 0])
            if has_cls:
                ((weights, _),) = calls
                rows = look.rows(encoded, weights[:, :, 0].mT)
                expected[ClsAttention((layer,))].append(rows)
                expected[EncoderSaliency(layer)].append(rows.mean(1))
            else:
                expected[EncoderSaliency(layer)] = expected[AttentionReceived(layer)]
    contents = look.contents()
    for signal, values in look.shown(list(expected)).items():
        wanted = torch.cat(expected[signal])[contents]
        assert wanted.std() > 1e-3, "all the same: nothing is shown by this"
        torch.testing.assert_close(values, wanted, atol=1e-6, rtol=0, msg=lambda m, s=signal: f"{s}: {m}")


@torch.no_grad()
@pytest.mark.parametrize(("name", "media"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_keys_and_outputs(name, media):
    """Keys are those of the projection; towers that normalise them do so, and no rotation is in them."""
    model = families.shared(name)
    inputs = families.batch(name, model, media=media).inputs
    adapter = vtprune.adapter_for(model)
    skip_unread(adapter)
    look = Look(adapter, inputs)
    layer = adapter.shape.feature_layer
    asked = [EncoderKeys(layer), EncoderKeys(layer, heads="mean"), EncoderOutput(layer)]
    expected: dict[EncoderSignal, list[Tensor]] = {signal: [] for signal in asked}
    for kind in adapter.visual_token_ids:
        watched = adapter.encoder_layers(kind)[layer]
        attention = adapter.encoder_attention(watched)
        fused = hasattr(attention, "qkv")
        caught: dict[str, Tensor] = {}

        def note(module, args, output, name="", caught=caught):
            caught.setdefault(name, output[0] if isinstance(output, tuple) else output)

        def keep(name, note=note):
            return lambda *args: note(*args, name=name)

        handles = [
            next(filter(None, map(attention._modules.get, ("qkv", "k_proj", "k")))).register_forward_hook(keep("keys")),
            watched.register_forward_hook(keep("output")),
        ]
        encoded = next(iter(encode_all(adapter, inputs, kind)), None)
        for handle in handles:
            handle.remove()
        if encoded is None:
            continue
        keys, output = (x if x.ndim == 3 else x[None] for x in (caught["keys"], caught["output"]))
        keys, output = cls_first(adapter, keys, 1), cls_first(adapter, output, 1)
        heads = getattr(adapter.vision_config, "num_heads", None) or adapter.vision_config.num_attention_heads
        groups = getattr(adapter.vision_config, "num_key_value_heads", None) or heads
        if fused:
            keys = keys.unflatten(-1, (heads + 2 * groups, -1))[..., heads : heads + groups, :].flatten(-2)
        if (norm := getattr(attention, "k_norm", None)) is not None and hasattr(norm, "weight"):
            keys = norm(keys.unflatten(-1, (-1, norm.weight.numel()))).flatten(-2)  # over each head, or over all
        expected[asked[0]].append(look.rows(encoded, keys))
        expected[asked[1]].append(look.rows(encoded, keys.unflatten(-1, (groups, -1)).mean(2)))
        expected[asked[2]].append(look.rows(encoded, output))
    contents = look.contents()
    for signal, values in look.shown(asked).items():
        wanted = torch.cat(expected[signal])[contents]
        torch.testing.assert_close(values, wanted, atol=1e-5, rtol=1e-5, msg=lambda m, s=signal: f"{s}: {m}")


@pytest.fixture
def flash():
    """Stands in for FlashAttention, which gets no mask of packed images and needs an accelerator."""
    name = "flash_attention_2"
    before = ALL_ATTENTION_FUNCTIONS[name]
    ALL_ATTENTION_FUNCTIONS[name] = lambda module, query, key, value, *args, **kwargs: (value.transpose(1, 2), None)
    yield name
    del ALL_ATTENTION_FUNCTIONS[name]
    assert ALL_ATTENTION_FUNCTIONS[name] is before


@torch.no_grad()
@pytest.mark.parametrize("name", PACKED)
def test_packed_images_under_flash_attention(flash, name):
    """The attention of the first layer, whose input no attention function has touched."""
    inputs = families.batch(name, families.shared(name)).inputs
    eager, model = families.shared(name, "eager"), families.build(name)
    for module in vtprune.adapter_for(model).vision_tower().modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = flash
    asked = [AttentionReceived(0), EncoderKeys(0)]
    expected = Look(vtprune.adapter_for(eager), inputs).shown(asked)
    for signal, values in Look(vtprune.adapter_for(model), inputs).shown(asked).items():
        torch.testing.assert_close(values, expected[signal], atol=1e-6, rtol=0)


def test_packed_images_that_cannot_be_told_apart_are_an_error(monkeypatch):
    model = families.shared("pixtral")
    inputs = families.batch("pixtral", model).inputs
    whole = Pixtral.encoder_sequences
    monkeypatch.setattr(Pixtral, "encoder_sequences", lambda self, kind, inputs: whole(self, kind, inputs)[:-1])
    with (
        vtprune.prune(model, "visionzip", keep_ratio=0.5),
        pytest.raises(vtprune.VTPruneError, match="Pixtral states sequences of .*override its `encoder_sequences`"),
    ):
        model(**inputs)


def test_a_tower_whose_projections_are_not_known_is_refused_when_the_session_opens():
    model = families.build("llava")
    for layer in vtprune.adapter_for(model).encoder_layers():
        layer.self_attn.query = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    with pytest.raises(vtprune.UnsupportedStageError, match="CLIPAttention has none of the projections q_proj and k_"):
        vtprune.prune(model, "visionzip", keep_ratio=0.5)
    vtprune.prune(model, "divprune", keep_ratio=0.5)


@pytest.mark.parametrize("method", ["visionzip", "fastervlm", "vispruner", "fastvid", "recoverable"])
def test_the_report_names_what_stands_in_for_the_cls_token(method):
    for name, notes in (("llava", 0), ("qwen2_5_vl", 1)):
        model = families.shared(name)
        with vtprune.prune(model, method, keep_ratio=0.5) as session:
            model(**families.batch(name, model).inputs)
        report = session.report
        assert len(report.notes) == len(report.to_dict()["notes"]) == notes
        assert all(note.startswith(f"{method}: no CLS token; attention received in") for note in report.notes)
        assert all(note in str(report) for note in report.notes)
