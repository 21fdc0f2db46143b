# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vtprune
from vtprune import cost
from vtprune.testing import families
from vtprune.testing.media import END, START, VIDEO, VIDEO_END, VIDEO_START
from vtprune.testing.recompute import recompute

from .checks import blinkered, check_pruned, check_untouched, every_cell

NAME = "ernie4_5_vl"
pytestmark = pytest.mark.skipif(not families.is_available(NAME), reason="this release has no Ernie 4.5 VL")

ARGUMENTS = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}


def encoded(model, kind: str):
    """Adapter, arguments of an encode call, and what it gives."""
    inputs = families.batch(NAME, model, media=kind).inputs
    arguments = {name: inputs[name] for name in ARGUMENTS[kind]}
    output = getattr(model.model, f"get_{kind}_features")(**arguments, return_dict=True)
    return vtprune.adapter_for(model), arguments, output


@pytest.mark.parametrize(("kind", "together"), [("image", 1), ("video", 2)])
@torch.no_grad()
def test_tokens_stand_for_squares_of_patches_in_one_frame_or_two(kind, together):
    model = blinkered(NAME)
    adapter, arguments, output = encoded(model, kind)
    pixels, grids = (arguments[name] for name in ARGUMENTS[kind])
    before = torch.cat(output.pooler_output)
    media = adapter.media(kind, arguments, output.pooler_output)
    assert [sum(map(len, medium.grids)) for medium in media] == list(map(len, output.pooler_output))
    token = patch = 0
    for medium, (frames, rows, columns) in zip(media, grids.tolist(), strict=True):
        assert len(medium.grids) == frames // together
        assert {(grid.rows, grid.cols) for grid in medium.grids} == {(rows // 2, columns // 2)}
        squares = rows * columns // 4
        for frame in range(frames):
            for square in (0, 1, squares - 1):
                changed = pixels.clone()
                first = patch + 4 * (frame * squares + square)
                changed[first : first + 4] += 1
                after = getattr(model.model, f"get_{kind}_features")(changed, grids, return_dict=True).pooler_output
                moved = (torch.cat(after) != before).any(-1).nonzero().flatten()
                assert moved.tolist() == [token + frame // together * squares + square]
        token += squares * frames // together
        patch += 4 * squares * frames


@pytest.mark.parametrize(("kind", "together"), [("image", 1), ("video", 2)])
@torch.no_grad()
def test_values_are_means_of_the_patches_of_a_token(kind, together):
    model = families.shared(NAME)
    adapter, arguments, output = encoded(model, kind)
    grids = arguments[f"{kind}_grid_thw"].tolist()
    count = len(arguments[ARGUMENTS[kind][0]])
    numbers = torch.arange(float(count))[:, None]
    expected, start = [], 0
    for frames, rows, columns in grids:
        by_frame = torch.arange(float(start), start + frames * rows * columns).view(frames, -1, 4)
        expected += [by_frame[f : f + together].mean((0, 2)) for f in range(0, frames, together)]
        start += by_frame.numel()
    means = adapter.projector_inputs(kind, arguments, numbers)
    torch.testing.assert_close(means[:, 0], torch.cat(expected))
    torch.testing.assert_close(adapter.patch_values(kind, arguments, numbers[None]), means)
    assert len(means) == sum(map(len, output.pooler_output))


def test_facts():
    adapter = vtprune.adapter_for(families.shared(NAME))
    assert adapter.marker_token_ids == (START, END, VIDEO_START, VIDEO_END)
    bare = families.build(NAME, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, head_dim=128)
    assert vtprune.adapter_for(bare).position_axes == 3  # the default sections, which the config does not name


# -- experts of visual tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["divprune", "fastv"])
@torch.no_grad()
def test_each_token_that_is_left_keeps_its_experts(method):
    model = families.shared(NAME)
    inputs = families.batch(NAME, model, media="video").singles[0]
    seen, handles = {}, []
    for index, layer in enumerate(model.get_decoder().layers):
        if hasattr(layer.mlp, "vision_moe"):
            for name in ("text_moe", "vision_moe"):
                handles.append(
                    getattr(layer.mlp, name).register_forward_pre_hook(
                        lambda module, args, key=(index, name): seen.update({key: len(args[0].view(-1, 32))})
                    )
                )
    with vtprune.prune(model, method, keep_ratio=0.6) as session:
        model(**inputs)
    for handle in handles:
        handle.remove()
    text = int((inputs["moe_mm_token_type_ids"] == 0).sum())
    around = int((inputs["moe_mm_token_type_ids"] != 0).sum()) - int((inputs["input_ids"] == VIDEO).sum())
    assert around == 2 and len({session.report.counts[0, layer].item() for layer in range(8)}) <= 2
    for layer in range(1, 8):
        kept = len(session.report.kept(0, layer))
        assert (seen[layer, "text_moe"], seen[layer, "vision_moe"]) == (text, kept + around)


@torch.no_grad()
def test_without_kinds_all_tokens_are_text():
    model = families.shared(NAME)
    inputs = dict(families.batch(NAME, model).singles[0])
    inputs["moe_mm_token_type_ids"] = torch.zeros_like(inputs["moe_mm_token_type_ids"])
    with vtprune.prune(model, "fastv", keep_ratio=0.6) as session:
        logits = model(**{key: x for key, x in inputs.items() if key != "moe_mm_token_type_ids"}).logits[0, -1]
    kept = [session.report.kept(0, layer) for layer in range(8)]
    expected = recompute(model, inputs, torch.empty(0, dtype=torch.long), kept)[-1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_nothing_comes_back_without_its_experts():
    with pytest.raises(vtprune.UnsupportedStageError, match="lazyllm brings tokens.*moe_mm_token_type_ids.*fastv"):
        vtprune.prune(families.shared(NAME), "lazyllm", keep_ratio=0.5)


def test_flops_are_what_torch_counts():
    model = families.build(NAME, attention="eager")
    model.set_experts_implementation("eager")
    decoder, visual, text = model.get_decoder(), 19, 7
    kinds = torch.tensor([[0] * 3 + [1] * visual + [0] * 4])
    with torch.no_grad(), FlopCounterMode(display=False, depth=None) as counter:
        decoder(inputs_embeds=torch.randn(1, visual + text, 32), moe_mm_token_type_ids=kinds)
    counted = counter.get_flop_counts()
    layers = [sum(counted[f"{type(decoder).__name__}.layers.{index}"].values()) for index in range(8)]
    assert cost.llm_prefill_flops(decoder.config, [visual] * 8, text) == sum(layers)
    with pytest.raises(vtprune.ConfigError, match="'visual_only' knows one MLP.*experts for visual tokens"):
        cost.llm_prefill_flops(decoder.config, [visual] * 8, text, "visual_only")


# -- sessions ----------------------------------------------------------------------------------------------------------


@every_cell(NAME, cls_token=False)
def test_pruned_generation_is_the_recomputed_one(media, method, attention, positions):
    check_pruned(NAME, media, method, attention, positions)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_everything_changes_nothing(attention):
    check_untouched(NAME, "mixed", attention)
