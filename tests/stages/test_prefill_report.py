# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from types import SimpleNamespace

import torch

from vtprune.report import Timings
from vtprune.signals import AttentionReceived, EncoderSaliency, LastQueryAttention
from vtprune.stages.cutting import cut_sequence
from vtprune.stages.prefill_report import prefill_report, substitutes, text_report
from vtprune.tokens import Selection

from .hand_made import CONFIG, DEPTH, SHAPE, ScriptedBefore, ScriptedInside, adapter, call_of, encoding, row_of


class TinyModel:
    """Gives a report its name."""


FACTS = dict(
    model=TinyModel(),
    vision_config="of the encoder",
    has_cls=True,
    gated_encoder_mlp=False,
    encoder_mlp_width=None,
    encoder_uncounted="",
)
METHODS = [ScriptedBefore(), ScriptedInside()]
RECORDER = SimpleNamespace(sequences=lambda encoding: [4, (4, 2)])


def cut(call, layer, *places, sources=None, **options):
    groups = call.crop_groups()
    keep = torch.zeros_like(groups.valid)
    for group, kept in enumerate(places):
        keep[group, list(kept)] = True
    hidden = torch.zeros(*call.sequence.columns.shape, 2)
    cut_sequence(call, hidden, groups, Selection(keep, sources=sources), layer, compact=False, **options)


def call(**fields):
    """Images in the columns 2 to 4, and 0 and 1."""
    media = encoding(row_of(3), row_of(2))
    return call_of(".tiiit", "iitttt", encodings=[media], adapter=adapter(**FACTS), **fields)


def report(prompts, notes=(), timings=None, selection_flops=None):
    measured = {"timings": timings, "selection_flops": selection_flops}
    return prefill_report(prompts, RECORDER, METHODS, notes, **measured)


def lists(tensors) -> list[list[int]]:
    return [tensor.tolist() for tensor in tensors]


def test_layers_between_cuts_hold_the_same():
    prompts = call()
    cut(prompts, 0, [0, 2], [0, 1])
    cut(prompts, 2, [1], [1])
    found = report(prompts)
    assert [(r.start, r.end) for r in found.layer_ranges] == [(0, 2), (2, DEPTH)]
    assert [lists(r.kept) for r in found.layer_ranges] == [[[2, 4], [0, 1]], [[4], [1]]]
    assert lists(found.visual) == [[2, 3, 4], [0, 1]]
    assert found.counts.tolist() == [[2, 2, 1, 1], [2, 2, 1, 1]]


def test_merged_tokens_say_where_they_went():
    prompts = call()
    cut(prompts, 1, [0, 2], [1], sources=torch.tensor([[0, 2, 2], [1, 1, -1]]))
    before, behind = report(prompts).layer_ranges
    assert lists(before.merged_into) == [[2, 3, 4], [0, 1]]
    assert lists(behind.merged_into) == [[2, 4, 4], [1, 1]]
    cut(prompts, 2, [0], [0])
    assert lists(report(prompts).layer_ranges[-1].merged_into) == [[2, -1, -1], [1, 1]]


def test_masked_tokens_are_named_beside_those_kept():
    prompts = call()
    cut(prompts, 1, [1], [0, 1], masking=True)
    before, behind = report(prompts).layer_ranges
    assert before.masked == () and lists(behind.masked) == [[2, 4], []]
    assert lists(behind.kept) == [[3], [0, 1]]


def test_columns_count_from_the_start_of_the_cache():
    prompts = call(past=10)
    cut(prompts, 0, [1], [])
    found = report(prompts)
    (only,) = found.layer_ranges
    assert lists(found.visual) == [[12, 13, 14], [10, 11]] and lists(only.kept) == [[13], []]
    assert lists(only.merged_into) == [[-1, 13, -1], [-1, -1]]


def test_text_is_what_is_real_and_not_visual():
    assert report(call()).text_tokens == (2, 4)
    shorter = call(prompt=torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]).bool())
    assert report(shorter).text_tokens == (1, 1), "an answer behind the prompt was counted"


def test_one_beam_stands_for_all():
    prompts = call_of("tii", "tii", "iit", "iit", encodings=[encoding(row_of(2), row_of(2))], adapter=adapter(**FACTS))
    cut(prompts, 0, [0], [0], [1], [1])
    found = report(prompts)
    assert found.samples == 2 and lists(found.visual) == [[1, 2], [0, 1]] and found.text_tokens == (1, 1)
    assert lists(found.layer_ranges[0].kept) == [[1], [0]]


def test_facts_of_the_model_and_of_the_session_are_passed_on():
    timings = Timings(1.0, 2.0, 3.0)
    found = report(call(), notes=("a note",), timings=timings)
    assert found.model_name == "TinyModel" and found.methods == ("scripted_before", "scripted_inside")
    assert found.notes == ("a note",) and found.timings is timings
    assert found.text_config is CONFIG and found.vision_config == "of the encoder"
    assert found.encoder_has_cls and not found.encoder_gated_mlp and found.kv_dtype_bytes == 4
    half = call()
    half.embeddings = half.embeddings.to(torch.bfloat16)
    assert report(half).kv_dtype_bytes == 2


def test_what_the_encoder_ran_is_counted_only_if_it_was_seen():
    prompts = call()
    assert report(prompts).encoder_sequences == (4, (4, 2))
    (ran,) = prompts.media.encodings
    prompts.media = replace(prompts.media, encodings=(replace(ran, inputs=None),))
    assert report(prompts).encoder_sequences == ()


def test_flops_of_an_encoder_of_another_kind_are_not_counted():
    hidden = torch.zeros(2, 5, 8)
    stated = adapter(**FACTS | {"encoder_uncounted": "it has no layers"})
    found = text_report(stated, METHODS, (), hidden, torch.ones(2, 5), selection_flops=0)
    assert found.encoder_flops is None and found.to_dict()["encoder_flops"] is None
    assert "FLOPs of the encoder are not counted: it has no layers" in str(found)


def test_a_prompt_of_text_alone():
    hidden = torch.zeros(2, 5, 8)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    found = text_report(adapter(**FACTS), METHODS, ("a note",), hidden, mask, selection_flops=0)
    assert found.selection_flops == 0
    assert found.text_tokens == (3, 5) and found.notes == ("a note",)
    assert found.original_tokens == [0, 0] and found.keep_ratio == 1.0 and found.depth == DEPTH
    for other in (None, torch.zeros(2, 1, 5, 5)):
        found = text_report(adapter(**FACTS), METHODS, (), hidden, other, selection_flops=None)
        assert found.text_tokens == (5, 5)


def test_notes_name_what_stands_in_for_a_cls_token_once():
    class Other(ScriptedBefore):
        name = "other"

    signals = (EncoderSaliency(1), AttentionReceived(1), EncoderSaliency(1), EncoderSaliency(2))
    methods = [ScriptedBefore(requests=signals), Other(requests=signals[:1])]
    methods.append(ScriptedInside(requests=(LastQueryAttention(0),)))
    assert substitutes(methods, SHAPE) == ()
    assert substitutes(methods, replace(SHAPE, has_cls=False)) == (
        "scripted_before: no CLS token; attention received in encoder layer 1 instead",
        "scripted_before: no CLS token; attention received in encoder layer 2 instead",
        "other: no CLS token; attention received in encoder layer 1 instead",
    )
