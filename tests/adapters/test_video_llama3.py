# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
import torch
import transformers as hf

import vtprune
from vtprune.errors import UnsupportedStageError
from vtprune.signals import EncoderFeatures
from vtprune.stages.encoder_call import EncoderCall
from vtprune.testing import families
from vtprune.testing.media import MERGE, PATCH, VIDEO
from vtprune.testing.recompute import recompute
from vtprune.tokens import Grid, Medium

from . import packed
from .checks import ATOL, NEW, blinkered, generate

NAME = "video_llama3"
SIDES = {"image": 1, "video": MERGE}
"""Patches in a row of what becomes one token."""

every_kind = pytest.mark.parametrize("kind", SIDES)


def process(kind, media):
    sizes = dict(patch_size=PATCH, merge_size=SIDES[kind], do_resize=False, return_tensors="pt")
    if kind == "image":
        return dict(hf.VideoLlama3ImageProcessor()(media, **sizes))
    found = dict(hf.VideoLlama3VideoProcessor()(media, do_sample_frames=False, use_token_compression=False, **sizes))
    assert bool(found.pop("video_compression_mask").all())
    return found


@every_kind
def test_tokens_stand_for_the_pixels_that_they_show(kind):
    sizes = {"image": [(1, 3, 5), (1, 4, 3)], "video": [(3, 3, 5), (2, 4, 3)]}[kind]
    cell = PATCH * SIDES[kind]
    packed.check_places(blinkered(NAME), kind, lambda media: process(kind, media), sizes, cell)


@every_kind
def test_encoder_values_stand_beside_what_is_made_of_them(kind):
    cell, shots = PATCH * SIDES[kind], (1, 1) if kind == "image" else (3, 2)
    media = [torch.randint(0, 200, (count, 3, 3 * cell, 2 * cell), dtype=torch.uint8) for count in shots]
    inputs = process(kind, [m[0] for m in media] if kind == "image" else media)
    packed.check_rows_of_patches(blinkered(NAME), kind, inputs)


@every_kind
def test_encoder_flops(kind):
    tower = families.shared(NAME, "eager").model.vision_model
    packed.check_encoder_flops(NAME, kind, tower.embeddings.patch_embedding)


# -- tokens that are left out of the prompt ----------------------------------------------------------------------------


def compressed(model, samples: int = 3):
    """The batch of videos, of which tokens are left out as the processor does, all of one frame among them."""
    batch = families.batch(NAME, model, media="video", samples=samples)
    singles = []
    for single in batch.singles:
        grids = single["video_grid_thw"]
        lengths = [int(rows * columns) // MERGE**2 for _, rows, columns in grids.tolist()]
        generator = torch.Generator().manual_seed(int(grids.sum()))
        frames = []
        for (count, _, _), length in zip(grids.tolist(), lengths, strict=True):
            for frame in range(count):
                kept = torch.rand(length, generator=generator) < 0.6
                frames.append(torch.ones_like(kept) if frame == 0 else kept & (frame != 1))
        mask = torch.cat(frames)
        ids = single["input_ids"][0]
        visual = (ids == VIDEO).nonzero().flatten()
        stay = torch.ones_like(ids, dtype=torch.bool)
        stay[visual[~mask]] = False
        text = {key: single[key][:, stay] for key in ("input_ids", "attention_mask")}
        singles.append(single | text | {"video_compression_mask": mask})
    longest = max(single["input_ids"].shape[1] for single in singles)
    pads = [longest - single["input_ids"].shape[1] for single in singles]
    inputs = {
        key: torch.cat(
            [torch.nn.functional.pad(one[key], (width, 0)) for one, width in zip(singles, pads, strict=True)]
        )
        for key in ("input_ids", "attention_mask")
    } | {key: torch.cat([one[key] for one in singles]) for key in singles[0] if "video" in key}
    return replace(batch, inputs=inputs, singles=singles, pads=pads)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("method", ["random", "divprune", "mmtok", "vidcom2", "fastv", "transprune"])
def test_what_the_processor_left_out_is_not_pruned_again(method, positions):
    model = families.shared(NAME)
    batch = compressed(model)
    with vtprune.prune(model, method, keep_ratio=0.4, positions=positions) as session:
        output = generate(model, batch)
        report = session.report
        alone = [(generate(model, replace(batch, inputs=single)), session.report)[1] for single in batch.singles]
    assert report.original_tokens == [int((single["input_ids"] == VIDEO).sum()) for single in batch.singles]
    assert report.keep_ratio < 0.6
    for sample, single in enumerate(batch.singles):
        kept = [report.kept(sample, layer) - batch.pads[sample] for layer in range(report.depth)]
        assert [one.tolist() for one in kept] == [
            alone[sample].kept(0, layer).tolist() for layer in range(report.depth)
        ]
        generated = output.sequences[sample, -NEW:]
        expected = recompute(model, single, generated[:-1], kept, positions)[-NEW:]
        torch.testing.assert_close(torch.stack(output.logits, 1)[sample], expected, atol=ATOL, rtol=0)


@torch.no_grad()
def test_what_needs_whole_frames_is_refused():
    model = families.shared(NAME)
    with (
        vtprune.prune(model, "pool", keep_ratio=0.4, strict=False),
        pytest.raises(UnsupportedStageError, match="needs whole images laid out as a grid"),
    ):
        model(**compressed(model).singles[0])


class Shown(vtprune.BeforeLLM):
    name, signal = "shown_features", "encoder features"

    def signals(self, shape):
        return (EncoderFeatures(),)

    def scores(self, tokens):
        SEEN.append((tokens, tokens[EncoderFeatures()]))
        return tokens.features[..., 0]


SEEN: list = []


@torch.no_grad()
def test_methods_are_shown_the_tokens_of_the_prompt():
    model = families.shared(NAME)
    adapter = vtprune.adapter_for(model)
    single = compressed(model).singles[2]
    SEEN.clear()
    with vtprune.prune(model, Shown(keep_ratio=0.5)):
        model(**single)
    ((tokens, shown),) = SEEN
    mask = single["video_compression_mask"].split([9] * 5) if len(single["video_compression_mask"]) == 45 else None
    assert mask is not None and [int(m.sum()) for m in mask][:2] == [9, 0]
    assert tokens.lengths.tolist() == [int(m.sum()) for m in mask if m.any()]
    assert tokens.grids[0] == Grid(3, 3) and set(tokens.grids[1:]) == {None}
    inputs = {key: single[key] for key in ("pixel_values_videos", "video_grid_thw", "video_merge_sizes")}
    features, entered = packed.encode(adapter, "video", inputs)
    kept = single["video_compression_mask"]
    for values, all_of_them in ((tokens.features, features[0]), (shown, entered)):
        rows = torch.cat([row[valid] for row, valid in zip(values, tokens.valid, strict=True)])
        assert torch.equal(rows, all_of_them[kept])


def test_a_mask_of_other_tokens_is_refused():
    """transformers repeats the mask for beams, and the features otherwise."""
    call = EncoderCall("video", {}, None, [torch.zeros(6, 2)])
    with pytest.raises(UnsupportedStageError, match="6 video tokens were encoded, but the call says of 12"):
        call.place([Medium.of_grids(Grid(2, 3))], torch.tensor([True, False] * 6))


def test_the_first_time_stamp_is_no_question():
    model = families.shared(NAME)
    ids = families.batch(NAME, model, media="video").singles[0]["input_ids"]
    visual = (ids == VIDEO).nonzero()[:, 1]
    marked = vtprune.adapter_for(model).markers(ids, torch.where(ids == VIDEO, 0, -1))[0].nonzero().flatten().tolist()
    first = int(visual[0])
    assert ids[0, first - 3] == 30 and marked[:3] == [first - 3, first - 2, first - 1]
    inside = [c for c in range(first, int(visual[-1])) if ids[0, c] != VIDEO]
    assert marked[3:] == inside
