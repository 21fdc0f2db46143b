# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
import torch

import vtprune
from vtprune.signals import EncoderFeatures
from vtprune.stages.encoder import EncoderRecorder
from vtprune.testing import families
from vtprune.testing.recompute import recompute
from vtprune.tokens import Grid
from vtprune.transformers_private import cache_of

from .checks import generate

NAME, ATOL, WINDOW = "unlimited_ocr", 1e-4, 3
pytestmark = pytest.mark.skipif(not families.is_available(NAME), reason="not in this release of transformers")


def views(*grids: tuple[int, int]) -> dict:
    """Whole views of 16 tokens, and tiles of 4 in so many columns and rows."""
    generator, counts = torch.Generator().manual_seed(0), [columns * rows for columns, rows in grids]
    return {
        "pixel_values": torch.randn(len(grids), 3, 64, 64, generator=generator),
        "pixel_values_local": torch.randn(sum(counts), 3, 32, 32, generator=generator) if sum(counts) else None,
        "num_local_patches": counts,
        "patches_grid": [list(grid) for grid in grids],
    }


@torch.no_grad()
def test_the_mosaic_then_the_whole_view_then_a_separator():
    """Found by changing one picture at a time, in the model itself."""
    model, inputs = families.shared(NAME), views((3, 2), (0, 0), (1, 2))
    adapter = vtprune.adapter_for(model)

    def features(**changed):
        return torch.cat(list(model.model.get_image_features(**inputs | changed, return_dict=True).pooler_output))

    before = features()
    media = adapter.media("image", inputs, [])
    assert [len(medium) for medium in media] == [4 * (6 + 1) + 21, 21, 4 * (2 + 1) + 21]
    assert [medium.grids for medium in media] == [(*[Grid(2, 2)] * tiles, Grid(4, 4)) for tiles in (6, 0, 2)]
    claimed = torch.cat([torch.where(m.crops < 0, -1, m.crops + 10 * i) for i, m in enumerate(media)])
    for name, crops in (("pixel_values", (6, 10, 22)), ("pixel_values_local", (*range(6), 20, 21))):
        for place, crop in enumerate(crops):
            pixels = inputs[name].clone()
            pixels[place] += 1
            moved = (features(**{name: pixels}) - before).abs().amax(-1) > 1e-3
            assert moved.equal(claimed == crop)
    ends = [len(before) - 1, len(before) - 1 - 33, len(before) - 1 - 33 - 21]
    assert before[ends].equal(model.model.view_separator.expand(3, -1))
    first = media[0]
    assert first.lines.tolist() == [
        *(row for row in range(4) for _ in range(7)),
        *(4 + row for row in range(4) for _ in range(5)),
        -1,
    ]


@torch.no_grad()
@pytest.mark.parametrize("grids", [((2, 1), (0, 0), (1, 2)), ((0, 0), (0, 0)), ((2, 2),)])
def test_features_are_those_that_are_projected(grids):
    """The projector runs twice a call."""
    model, inputs = families.shared(NAME), views(*grids)
    recorder = EncoderRecorder(vtprune.adapter_for(model), [EncoderFeatures()], profile=False)
    handles = list(recorder.install())
    output = model.model.get_image_features(**inputs, return_dict=True)
    for handle in handles:
        handle.remove()
    features = recorder.projector_inputs([recorder.encoding("image", output)])
    projected, expected = model.model.multi_modal_projector(features), torch.cat(list(output.pooler_output))
    media = vtprune.adapter_for(model).media("image", inputs, [])
    content = torch.cat([medium.crops for medium in media]) >= 0
    assert (features[~content] == 0).all()
    torch.testing.assert_close(projected[content], expected[content], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_answer_longer_than_its_window(attention):
    """Every token sees the whole prompt that is left, and the last tokens of the answer; in a padded batch, too."""
    model = families.build(NAME, attention, sliding_window=WINDOW)
    wide = families.build(NAME, attention)
    batch = families.batch(NAME, model)
    with vtprune.prune(model, "divprune", keep_ratio=0.3, positions="compact") as session:
        alone = generate(model, replace(batch, inputs=batch.singles[0]))
        output = generate(model, batch)
    report = session.report
    for sample, inputs in enumerate(batch.singles):
        kept = [report.kept(sample, layer) - batch.first_column(sample) for layer in range(report.depth)]
        logits, generated = torch.stack(output.logits, 1)[sample], output.sequences[sample, -len(output.logits) :]
        expected = recompute(model, inputs, generated[:-1], kept, "compact")[-len(logits) :]
        torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)
        assert (expected[-1] - recompute(wide, inputs, generated[:-1], kept, "compact")[-1]).abs().max() > 1e-2
    torch.testing.assert_close(torch.cat(alone.logits), torch.stack(output.logits, 1)[0], atol=ATOL, rtol=0)
    for layer in cache_of(output).layers:
        assert layer.prefill_keys.shape[2] == layer.prefill_length < batch.inputs["input_ids"].shape[1]
        assert layer.keys.shape[2] == WINDOW - 1


@torch.no_grad()
def test_images_of_a_later_turn_are_refused():
    """They would go into the window of the answer."""
    model = families.shared(NAME)
    inputs = families.batch(NAME, model).singles[0]
    text = {"input_ids": inputs["input_ids"][:, -3:]}
    with vtprune.prune(model, "divprune", keep_ratio=0.3):
        cache = cache_of(model(**text, use_cache=True))
        mask = torch.ones(1, 3 + inputs["input_ids"].shape[1], dtype=torch.long)
        with pytest.raises(vtprune.UnsupportedStageError, match="later turn.*send the whole conversation"):
            model(**inputs | {"attention_mask": mask}, cache=cache)
        with pytest.raises(
            vtprune.UnsupportedStageError, match="StaticReferenceSlidingWindowLayer.*default dynamic cache"
        ):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")


def test_what_acts_inside_the_language_model_is_refused():
    with pytest.raises(vtprune.UnsupportedStageError, match="fastv.*keep prompt and answer apart.*divprune"):
        vtprune.prune(families.shared(NAME), "fastv", keep_ratio=0.5)
