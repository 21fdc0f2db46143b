# SPDX-License-Identifier: Apache-2.0
"""What is recorded of the encoder of a tiny LLaVA (four layers with a CLS token, 36 patches an image)."""

import contextlib
import threading
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

import vtprune
from vtprune.errors import ConfigError, UnsupportedStageError, VTPruneError
from vtprune.signals import (
    AttentionReceived,
    ClsAttention,
    EncoderFeatures,
    EncoderKeys,
    EncoderOutput,
    EncoderSignal,
    JointSpace,
    Taps,
)
from vtprune.stages.encoder import EncoderRecorder, clock
from vtprune.stages.encoder_call import EncoderCall
from vtprune.stages.in_encoder import EncoderMerge
from vtprune.testing import families
from vtprune.tokens import Grid, Medium
from vtprune.transformers_private import EncoderScores

WHOLE, SIDE = 36, 42


@pytest.fixture(autouse=True)
def _fast(one_thread):
    with torch.no_grad():
        yield


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def recording(*signals, adapter=None, profile=False):
    adapter = adapter or vtprune.adapter_for(families.shared("llava"))
    recorder = EncoderRecorder(adapter, signals, profile=profile)
    handles = []
    try:
        for handle in recorder.install():
            handles.append(handle)
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def encode(recorder, images, **options):
    return recorder.adapter.base.get_image_features(images, return_dict=True, **options)


# -- what is recorded ---------------------------------------------------------------------------------------------


def test_a_call_is_recorded_with_its_arguments_by_name():
    images = pixels(2)
    with recording() as recorder:
        output = encode(recorder, images)
        found = recorder.encoding("image", None)
    assert found.inputs["pixel_values"] is images and found.output is output and found.kind == "image"
    assert [medium.grids for medium in found.media] == [(Grid(6, 6),)] * 2 and found.tokens == 2 * WHOLE
    assert torch.equal(found.features, torch.cat(list(output.pooler_output)))
    assert found.seconds == 0 and found.projector_input is None and not found.rows and not found.outputs


def test_the_method_is_put_back():
    base = families.shared("llava").model
    with recording():
        assert "get_image_features" in vars(base)
    assert "get_image_features" not in vars(base)
    with recording():
        inner = vars(base)["get_image_features"]
        with recording():
            assert vars(base)["get_image_features"] is not inner
        assert vars(base)["get_image_features"] is inner


def test_only_what_is_asked_for_is_kept_and_it_is_the_towers():
    signals = (EncoderFeatures(), EncoderOutput(1), ClsAttention((0, 2)), AttentionReceived(3), EncoderKeys(1))
    images = pixels(2)
    with recording(*signals) as recorder:
        encode(recorder, images)
        found = recorder.encoding("image", None)
    assert set(found.outputs) == {1} and set(found.rows) == {0, 2} and set(found.received) == {3}
    assert set(found.keys) == {1} and found.keys[1].shape == (2, WHOLE + 1, 4, 8)
    eager = families.shared("llava", "eager").model.vision_tower(
        images, output_attentions=True, output_hidden_states=True
    )
    torch.testing.assert_close(found.outputs[1], eager.hidden_states[2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.projector_input, eager.hidden_states[-2][:, 1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.rows[2], eager.attentions[2][:, :, 0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.received[3], eager.attentions[3].mean((1, 2)), atol=1e-6, rtol=1e-4)


def test_what_runs_outside_of_an_encode_call_is_not_recorded():
    with recording(EncoderOutput(1), EncoderFeatures()) as recorder:
        encode(recorder, pixels(1))
        found = recorder.encoding("image", None)
        recorder.adapter.vision_tower()(pixels(3))
        recorder.adapter.projector(torch.zeros(3, WHOLE, 32))
        assert found.outputs[1].shape[0] == found.projector_input.shape[0] == 1


def test_a_call_that_fails_leaves_nothing_behind():
    with recording(ClsAttention((0,))) as recorder:
        output = encode(recorder, pixels(1))
        assert recorder.encoding("image", output).inputs is not None
        broken = recorder.adapter.projector.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode(recorder, pixels(2))
        broken.remove()
        assert recorder.encoding("image", output).inputs is None, "what came before is not the last call any more"
        encode(recorder, pixels(1))
        assert recorder.encoding("image", None).tokens == WHOLE


def test_an_output_that_is_a_tuple_is_nothing_a_model_is_fed_with():
    with recording() as recorder:
        recorder.adapter.base.get_image_features(pixels(1), return_dict=False)
        given = SimpleNamespace(pooler_output=torch.zeros(1, WHOLE, 32), last_hidden_state=None)
        assert recorder.encoding("image", given).inputs is None


def test_threads_record_by_themselves_and_may_be_forgotten():
    other = {}
    with recording() as recorder:
        output = encode(recorder, pixels(1))
        thread = threading.Thread(target=lambda: other.update(found=recorder.encoding("image", output)))
        thread.start()
        thread.join()
        assert other["found"].inputs is None and recorder.encoding("image", output).inputs is not None
        recorder.forget()
        assert recorder.encoding("image", output).inputs is None


def test_seconds_are_measured_on_request():
    with recording(profile=True) as recorder:
        encode(recorder, pixels(1))
        assert recorder.encoding("image", None).seconds > 0
    assert clock(recorder.adapter.model) < clock(recorder.adapter.model)


# -- features that are handed in ----------------------------------------------------------------------------------


def handed(features, last_hidden_state=None):
    return SimpleNamespace(pooler_output=features, last_hidden_state=last_hidden_state)


def test_repeated_and_moved_features_are_those_that_were_recorded():
    """`generate()` repeats features for beams; wrappers copy outputs."""
    with recording() as recorder:
        output = encode(recorder, pixels(2))
        found = recorder.encoding("image", output)
        repeated = [part for part in output.pooler_output for copy in range(2)]
        for features in (repeated, torch.stack(list(output.pooler_output)).double()):
            assert recorder.encoding("image", handed(features, output.last_hidden_state)) is found


def test_other_features_are_not_taken_for_those_that_were_recorded():
    with recording() as recorder:
        encode(recorder, pixels(2))
        for width in (32, 16):
            assert recorder.encoding("image", handed(torch.zeros(2, WHOLE, width))).inputs is None


def test_a_part_of_the_features_is_refused():
    with recording() as recorder:
        output = encode(recorder, pixels(2))
        with pytest.raises(UnsupportedStageError, match="chunked prefill"):
            recorder.encoding("image", handed(output.pooler_output[0][None, :5]))


def test_features_of_a_family_with_one_grid_are_placed_without_their_pixels():
    with recording() as recorder:
        found = recorder.encoding("image", handed(torch.zeros(2, WHOLE, 32)))
        assert found.inputs is None and [medium.grids for medium in found.media] == [(Grid(6, 6),)] * 2
        assert recorder.image_keys(found) == [0, 0]
        with pytest.raises(UnsupportedStageError, match="computed elsewhere"):
            recorder.encoding("image", handed(torch.zeros(2, WHOLE - 1, 32)))
        with pytest.raises(UnsupportedStageError, match="computed elsewhere"):
            recorder.encoding("video", handed(torch.zeros(2, WHOLE, 32)))


# -- as values of visual tokens -----------------------------------------------------------------------------------


def seen(kind="image", tokens=WHOLE, images=1, **fields) -> EncoderCall:
    media = [Medium.without_grid(tokens) for _ in range(images)]
    return EncoderCall(kind, {"pixel_values": pixels(images)}, media=media, **fields)


def test_values_of_patches_are_those_of_visual_tokens_without_the_cls_token():
    values = torch.arange(2.0 * (WHOLE + 1)).view(2, WHOLE + 1, 1)
    with recording() as recorder:
        rows = recorder.per_token([seen(images=2)], lambda record: values)
        assert rows.flatten().tolist() == [*range(1, 37), *range(38, 74)]
        inputs = recorder.projector_inputs([seen(images=2, projector_input=values[:, 1:])])
        assert torch.equal(inputs, rows)
        both = recorder.per_token([seen(), seen()], lambda record: values[:1])
        assert both.flatten().tolist() == [*range(1, 37)] * 2


def test_adapters_that_give_another_number_of_rows_are_named():
    with recording() as recorder:
        with pytest.raises(VTPruneError, match="Llava gives 36 rows of encoder values for 9 .* its `patch_values`"):
            recorder.per_token([seen(tokens=9)], lambda record: torch.zeros(1, WHOLE + 1, 1))
        with pytest.raises(VTPruneError, match="override its `projector_inputs`"):
            recorder.projector_inputs([seen(tokens=9, projector_input=torch.zeros(1, WHOLE, 1))])


def merge(slots, **fields) -> EncoderMerge:
    """Of one crop with a CLS token: index of the token left that each token went into."""
    slots = torch.tensor([slots])
    nothing = EncoderMerge.nothing(torch.arange(1, slots.shape[1]), 1, slots.shape[1], slots.device)
    return replace(nothing, slots=slots, **fields)


def test_patches_are_counted_by_layer_where_tokens_were_merged():
    """Counts of what is left have the CLS token in them."""
    lengths = ((0, torch.tensor([31, 21])), (2, torch.tensor([11, 6])))
    merged = EncoderMerge.nothing(torch.arange(1), 2, WHOLE + 1, torch.device("cpu"))
    with recording() as recorder:
        assert recorder.sequences(seen(images=2)) == [WHOLE, WHOLE]
        assert recorder.sequences(seen(images=2, merge=merged)) == [WHOLE, WHOLE]
        counts = recorder.sequences(seen(images=2, merge=replace(merged, lengths=lengths)))
    assert counts == [(36, 30, 30, 10), (36, 20, 20, 5)]


def test_copies_are_numbered_through_over_all_encodings():
    """Three patches behind a CLS token; the second one went into the first."""
    places = torch.tensor([[0, 1, 3]])
    first = merge([0, 1, 1, 2], places=places)
    second = merge([0, 1, 2, -1], places=places)
    with recording() as recorder:
        into, same = recorder.copied_into([seen(tokens=3, merge=first), seen(tokens=2), seen(tokens=3, merge=second)])
    assert into.tolist() == [1, 1, 3, -1, -1, 5, 7, -2]
    assert same.tolist() == [True, False, True, True, True, True, False, False]


def test_keys_of_images_depend_on_their_pixels_alone():
    images = pixels(3)
    with recording() as recorder:
        keys = recorder.image_keys(EncoderCall("image", {"pixel_values": images}, media=[None] * 3))
        assert len(set(keys)) == 3 and all(0 <= key < 2**31 for key in keys)
        alone = recorder.image_keys(EncoderCall("image", {"pixel_values": images[1:2]}, media=[None]))
        assert alone == keys[1:2]
        ones = EncoderCall("image", {"pixel_values": torch.ones(1, 1, 1, 2, dtype=torch.half)}, media=[None])
        assert recorder.image_keys(ones) == [2 * 0x3C00]


# -- one sequence of several images -------------------------------------------------------------------------------


def scores(tokens: int, batch: int = 1) -> EncoderScores:
    states = torch.arange(float(batch * tokens)).view(batch, 1, tokens, 1)
    return EncoderScores(queries=states, keys=states, scale=1.0, mask=None)


@pytest.mark.parametrize(
    "lengths, calls, parts",
    [
        ([2, 3], [scores(5)], [2, 3]),
        ([5], [scores(5)], [5]),
        ([3, 3], [scores(3, batch=2)], [3]),
        ([2, 3], [scores(2), scores(3)], [2, 3]),
    ],
)
def test_packed_images_are_split(lengths, calls, parts):
    facts = vtprune.adapter_for(families.shared("llava"))
    facts.encoder_sequences = lambda kind, inputs: lengths
    with recording(adapter=facts) as recorder:
        found = recorder._by_image(calls, EncoderCall("image", {}), 0)
    assert [call.queries.shape[2] for call in found] == parts


def test_packed_images_that_cannot_be_split_are_an_error():
    facts = vtprune.adapter_for(families.shared("llava"))
    facts.encoder_sequences = lambda kind, inputs: [2, 2]
    with (
        recording(adapter=facts) as recorder,
        pytest.raises(VTPruneError, match="states sequences of 4 patches, and the vision encoder attends over 5"),
    ):
        recorder._by_image([scores(5)], EncoderCall("image", {}), 0)


# -- what is refused ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tapping(EncoderSignal):
    wanted: Taps

    def taps(self, shape):
        return self.wanted

    def read_encoded(self, view):
        raise AssertionError


@pytest.mark.parametrize(
    "wanted", [Taps(cls_rows=(0, 4)), Taps(received=(4,)), Taps(keys=(4,)), Taps(outputs=(4,)), Taps(keys=(-1,))]
)
def test_layers_that_the_encoder_does_not_have_are_refused(wanted):
    with pytest.raises(ConfigError, match=r"reads encoder layer (4|-1), and the vision encoder has layers 0..3"):
        EncoderRecorder(vtprune.adapter_for(families.shared("llava")), [Tapping(wanted)], profile=False)


def test_signals_of_a_clip_need_one():
    siglip, clip = (vtprune.adapter_for(families.shared(name)) for name in ("paligemma", "llava"))
    for signal in (JointSpace("a tower"), EncoderOutput(1, normalised=True)):
        EncoderRecorder(clip, [signal], profile=False)
        with pytest.raises(UnsupportedStageError, match="needs a CLIP as vision encoder"):
            EncoderRecorder(siglip, [signal], profile=False)
