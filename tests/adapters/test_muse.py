# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import Tensor

import vtprune
from vtprune.testing import families
from vtprune.testing.media import AUDIO, BOS, IMAGE, NEWLINE, PAD, VIDEO, VIDEO_END, VIDEO_START
from vtprune.testing.recompute import keep_all, recompute
from vtprune.tokens import Grid

from .checks import ATOL, NEW, check_pruned, check_untouched, every_cell
from .test_qwen_vl import encoder_inputs

SIZES = [(1, 6, 10), (2, 4, 6), (1, 4, 4)]
"""Frames, rows and columns of patches of each medium."""
every_family = pytest.mark.parametrize("name", ["muse_glimmer", "muse_spark"])


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def patches_of(kind: str) -> dict[str, Tensor]:
    """Media whose patches are in raster order, as Muse's processors flatten them."""
    names = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}[kind]
    count = sum(frames * rows * columns for frames, rows, columns in SIZES)
    return dict(zip(names, (torch.randn(count, 96), torch.tensor(SIZES)), strict=True))


@every_family
@pytest.mark.parametrize("kind", ["image", "video"])
def test_tokens_stand_for_squares_of_four_patches(name, kind):
    model = families.build(name)
    for layer in model.model.vision_tower.layers:
        layer.attn.proj.weight.zero_()
    adapter, inputs = vtprune.adapter_for(model), patches_of(kind)
    pixels = next(name for name in inputs if name.startswith("pixel"))
    seen: dict[str, Tensor] = {}
    tower, projector = adapter.vision_tower(), adapter.projector
    tower.layers[-1].register_forward_hook(lambda module, args, output: seen.update(layer=output))
    projector.register_forward_pre_hook(lambda module, args: seen.update(projector=args[0]))

    def look(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of every token: its feature, and what two layers of the encoder know of its patches."""
        features = torch.cat(getattr(model.model, f"get_{kind}_features")(**inputs).pooler_output)
        behind = adapter.patch_values(kind, inputs, tower.ln_post(seen["layer"])[None])
        return features, adapter.projector_inputs(kind, inputs, seen["projector"]), behind

    before = look(inputs)
    torch.testing.assert_close(before[1], before[2])
    media = adapter.media(kind, inputs, ())
    assert [medium.grids for medium in media] == [(Grid(r // 2, c // 2),) * f for f, r, c in SIZES]
    assert adapter.encoder_sequences(kind, inputs) == [60, 24, 24, 16]
    assert [len(own) for own in adapter.pixels(kind, inputs)] == [60, 48, 16]
    first_patch = first_token = 0
    for frames, rows, columns in SIZES:
        for frame, row, column in ((0, 0, 3), (frames - 1, rows - 1, 1), (0, 2, columns - 1)):
            changed = inputs | {pixels: inputs[pixels].clone()}
            changed[pixels][first_patch + (frame * rows + row) * columns + column] += 1
            token = first_token + (frame * rows // 2 + row // 2) * (columns // 2) + column // 2
            for old, new in zip(before, look(changed), strict=True):
                assert (old != new).any(1).nonzero().flatten().tolist() == [token]
        first_patch, first_token = first_patch + frames * rows * columns, first_token + frames * rows * columns // 4


def test_time_stamps_are_markers_from_the_first_one_on():
    adapter = vtprune.adapter_for(families.shared("muse_glimmer"))
    frame = [VIDEO] * 3
    ids = [BOS, 5, VIDEO_START, 30, 31, *frame, NEWLINE, 30, 32, *frame, NEWLINE, 30, 33, 34, *frame, VIDEO_END, 7, 8]
    ids = torch.tensor([[PAD, *ids], [PAD, BOS, 5, VIDEO_START, IMAGE, IMAGE, VIDEO_END, *[7] * 18]])
    images = torch.where((ids == VIDEO) | (ids == IMAGE), torch.tensor([[0], [1]]), -1)
    found = adapter.markers(ids, images)
    marks = torch.tensor([VIDEO_START, 30, 31, 32, 33, 34, NEWLINE, VIDEO_END])
    assert torch.equal(found, torch.isin(ids, marks))


@pytest.mark.parametrize("kind", ["image", "video"])
def test_encoder_sequences_are_those_of_the_layers_without_windows(kind):
    model = families.shared("muse_glimmer")
    adapter = vtprune.adapter_for(model)
    inputs = encoder_inputs(families.batch("muse_glimmer", model, media=kind).inputs, kind)
    lengths = []
    for layer in adapter.encoder_layers()[:1] + adapter.encoder_layers()[-1:]:
        handle = layer.register_forward_pre_hook(
            lambda module, args, given: lengths.append(given["cu_seqlens"].diff().tolist()), with_kwargs=True
        )
        getattr(model.model, f"get_{kind}_features")(**inputs)
        handle.remove()
    windows, whole = lengths
    assert adapter.encoder_sequences(kind, inputs) == whole and len(windows) > len(whole)


@every_family
@every_cell("muse_glimmer", cls_token=False)
def test_pruned_generation_is_the_recomputed_one(name, media, method, attention, positions):
    check_pruned(name, media, method, attention, positions)


@every_family
@pytest.mark.parametrize("media", ["image", "mixed"])
def test_keeping_everything_changes_nothing(name, media):
    check_untouched(name, media, "sdpa")


def test_layers_without_rotation_are_handed_none():
    model = families.shared("muse_glimmer")
    adapter, hidden = vtprune.adapter_for(model), torch.zeros(1, 4, 32)
    ours = [adapter.rope(layer, hidden, torch.arange(4)[None]) is None for layer in range(8)]
    given: list[bool] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: given.append(kwargs["position_embeddings"] is None), with_kwargs=True
        )
        for layer in adapter.decoder_layers
    ]
    model(input_ids=torch.tensor([[BOS, 5, 6, 7]]))
    for hook in hooks:
        hook.remove()
    assert ours == given and sum(ours) == 2


def spoken(samples: list[int]) -> dict[str, Tensor]:
    """Prompts with an image and audio of different lengths, padded on the left."""
    lengths, ids, pixels = (24, 8, 16), [], []
    for sample in samples:
        image = [IMAGE] * (6 + sample)
        ids.append([BOS, 5, *image, 6, *[AUDIO] * (lengths[sample] // 8), *range(10, 13 + sample)])
        pixels.append(torch.randn(4 * len(image), 96, generator=torch.Generator().manual_seed(sample)))
    longest, sound = max(map(len, ids)), max(lengths[sample] for sample in samples)
    waves = torch.zeros(len(samples), sound)
    mask = torch.zeros(len(samples), sound, dtype=torch.long)
    for row, sample in enumerate(samples):
        wave = torch.randn(lengths[sample], generator=torch.Generator().manual_seed(10 + sample))
        waves[row, : len(wave)], mask[row, : len(wave)] = wave, 1
    return {
        "input_ids": torch.tensor([[PAD] * (longest - len(one)) + one for one in ids]),
        "attention_mask": torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids]),
        "pixel_values": torch.cat(pixels),
        "image_grid_thw": torch.tensor([[1, 2, 2 * (6 + sample)] for sample in samples]),
        "input_values": waves,
        "input_values_mask": mask,
    }


@pytest.mark.parametrize("method", ["divprune", "mmtok", "fastv"])
def test_audio_stays(method):
    model, inputs = families.shared("muse_spark"), spoken([0, 1, 2])
    with vtprune.prune(model, method, keep_ratio=0.5, positions="original") as session:
        output = model.generate(
            **inputs,
            max_new_tokens=NEW,
            suppress_tokens=[IMAGE, VIDEO, AUDIO],
            output_logits=True,
            return_dict_in_generate=True,
        )
    report, steps = session.report, torch.stack(output.logits, 1)
    for sample in range(3):
        single = spoken([sample])
        padding = inputs["input_ids"].shape[1] - single["input_ids"].shape[1]
        visual = (single["input_ids"][0] == IMAGE).nonzero().flatten()
        assert (report.visual[sample] - padding).tolist() == visual.tolist()
        kept = [report.kept(sample, layer) - padding for layer in range(report.depth)]
        generated = output.sequences[sample, -NEW:]
        expected = recompute(model, single, generated[:-1], kept)[-NEW:]
        torch.testing.assert_close(steps[sample], expected, atol=ATOL, rtol=0)
        whole = recompute(model, single, generated[:-1], keep_all(model, single))[-NEW:]
        silent = recompute(model, single | {"input_values": 0 * single["input_values"]}, generated[:-1], kept)[-NEW:]
        for other in (whole, silent):
            assert (other - expected).abs().max() > 1e-2
