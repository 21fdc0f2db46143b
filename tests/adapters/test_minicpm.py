# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vtprune
from vtprune.testing import families
from vtprune.testing.media import AUDIO, BREAK, END, GLOBAL, IMAGE, NEWLINE, PATCH, ROW_COLUMN, START, VIDEO
from vtprune.tokens import Grid, ModelShape

from .checks import blinkered
from .merging import check_layout

NAMES = ["minicpmv4_6", "minicpmv4_7", "minicpm_ocr"]
pytestmark = pytest.mark.skipif(not hasattr(hf, "MiniCPMV4_7Config"), reason="not in this release of transformers")
every_name = pytest.mark.parametrize("name", NAMES)
both_modes = pytest.mark.parametrize(("mode", "side"), [("16x", 4), ("4x", 2)])


def packed(images: Tensor) -> Tensor:
    """(1, 3, patch, patches * patch): images (images, 3, height, width) as the processor packs their patches."""
    patches = images.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # image, channel, row, y, column, x
    return patches.permute(1, 3, 0, 2, 4, 5).flatten(2)[None]


def places(sizes: list[tuple[int, int]]) -> Tensor:
    """(1, patches, 3): image, row and column of each patch of images of these sizes."""
    rows = [(image, row, column) for image, (h, w) in enumerate(sizes) for row in range(h) for column in range(w)]
    return torch.tensor(rows, dtype=torch.float)[None]


@both_modes
@every_name
@torch.no_grad()
def test_tokens_stand_for_squares_of_patches(name, mode, side):
    model = blinkered(name)
    adapter = vtprune.adapter_for(model)
    rows, columns = 2 * side, 3 * side
    images = torch.randn(2, 3, rows * PATCH, columns * PATCH, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[rows, columns]] * 2, dtype=torch.int32)
    inputs = {"target_sizes": sizes, "downsample_mode": mode}

    def encode(images):
        return torch.cat(model.model.get_image_features(packed(images), **inputs).pooler_output)

    media = adapter.media("image", inputs, ())
    assert [medium.grids for medium in media] == [(Grid(2, 3),)] * 2
    check_layout(media, encode, images, PATCH, side)


@both_modes
def test_values_of_patches_and_of_merged_ones_are_averaged_over_their_token(mode, side):
    adapter = vtprune.adapter_for(families.shared("minicpmv4_6"))
    sizes = [(2 * side, side), (side, 3 * side)]
    inputs = {"target_sizes": torch.tensor(sizes), "downsample_mode": mode}
    expected = places([(2, 1), (1, 3)])[0]

    def centres(side: int) -> Tensor:
        return expected * torch.tensor([1, side, side]) + torch.tensor([0, (side - 1) / 2, (side - 1) / 2])

    assert torch.equal(adapter.patch_values("image", inputs, places(sizes)), centres(side))
    if mode == "16x":
        halved = places([(rows // 2, columns // 2) for rows, columns in sizes])
        assert torch.equal(adapter.projector_inputs("image", inputs, halved), centres(side // 2))


@every_name
@torch.no_grad()
def test_sequences_and_flops_of_every_layer(name):
    model = families.shared(name, "eager")
    adapter, inputs = vtprune.adapter_for(model), families.batch(name, model).inputs
    assert adapter.shape == ModelShape(4, 8, 3, has_cls=False)
    entering = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: entering.append(args[0].shape[1]))
        for layer in adapter.encoder_layers()
    ]
    with FlopCounterMode(display=False, depth=None) as counter:
        model.model.vision_tower(inputs["pixel_values"], inputs["target_sizes"], name != "minicpm_ocr")
    for handle in handles:
        handle.remove()
    stated = adapter.encoder_sequences("image", inputs)
    by_layer = [[one] * 4 if isinstance(one, int) else one for one in stated]
    assert entering == [sum(lengths) for lengths in zip(*by_layer, strict=True)]
    assert (entering[1] == entering[2]) == (name == "minicpm_ocr") and entering[0] == entering[1]
    counted = {path: sum(flops.values()) for path, flops in counter.get_flop_counts().items()}
    layers = [flops for path, flops in counted.items() if path.endswith((".embeddings", ".layers.0", ".layers.1"))]
    layers += [flops for path, flops in counted.items() if path.endswith((".layers.2", ".layers.3"))]
    assert len(layers) == 5
    assert vtprune.cost.encoder_flops(model.config.vision_config, stated, has_cls=False, gated_mlp=False) == sum(layers)


def pixels_of_each(adapter, inputs) -> list[Tensor]:
    return list(adapter.pixels("image", inputs))


def test_pixels_are_those_of_each_slice():
    model = families.shared("minicpmv4_6")
    adapter, batch = vtprune.adapter_for(model), families.batch("minicpmv4_6", model)
    together = pixels_of_each(adapter, batch.inputs)
    alone = [pixels for single in batch.singles for pixels in pixels_of_each(adapter, single)]
    assert len(together) == len(alone) == len(batch.inputs["target_sizes"]) > 4
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))


# -- markers ----------------------------------------------------------------------------------------------------------

SLICE = [BREAK, IMAGE, IMAGE, ROW_COLUMN]
ROWS = [*SLICE, *SLICE, NEWLINE, *SLICE, *SLICE]
WORDS = [5, 6, 7]


def language(ids: list[int]) -> list[int]:
    """What of a prompt is neither visual nor a marker."""
    adapter = vtprune.adapter_for(families.shared("minicpmv4_6"))
    row = torch.tensor([ids])
    visual = torch.isin(row, torch.tensor([IMAGE, VIDEO]))
    begins = visual & ~torch.cat([torch.zeros(1, 1, dtype=torch.bool), visual[:, :-1]], 1)
    images = (begins.cumsum(1) - 1).masked_fill(~visual, -1)
    return row[~adapter.markers(row, images) & ~visual].tolist()


@pytest.mark.parametrize("number", [[], [9], [9, 8]])
def test_numbers_of_images_and_rows_of_slices_are_no_language(number):
    tag = [GLOBAL, *number, AUDIO] if number else []
    image = [*tag, START, IMAGE, IMAGE, END]
    assert language([*WORDS, *image, *WORDS]) == WORDS * 2
    assert language([*WORDS, *image, *ROWS, *WORDS]) == WORDS * 2
    assert language([*WORDS, *image, 8, *image, *ROWS, *WORDS, *image, *image, 4]) == [*WORDS, 8, *WORDS, 4]
    assert language([*image, NEWLINE, *image]) == [NEWLINE]  # of the prompt itself


def test_frames_side_by_side():
    assert language([*WORDS, *[START, VIDEO, VIDEO, END] * 3, 4]) == [*WORDS, 4]
