# SPDX-License-Identifier: Apache-2.0
"""Smaller images: their grids, and their way through the encoder."""

import pytest
import tiny_eval
import torch
from PIL import Image

from vtprune.errors import UnsupportedStageError
from vtprune.eval.inputs import load_model, processed_view
from vtprune.eval.inputs.downsample import Downsampler, grid_for
from vtprune.eval.tasks import user_turn


@pytest.mark.parametrize("side", [4, 12, 24])
@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.11, 0.055])
def test_smaller_grid_is_the_nearest_one_of_the_same_shape(side, ratio):
    rows, cols = grid_for(side, side, ratio)
    assert abs(rows - cols) <= 1
    near = [r * c for r in range(1, side + 1) for c in (r, r + 1) if c <= side]
    assert abs(rows * cols - ratio * side**2) == min(abs(n - ratio * side**2) for n in near)


def test_grid_follows_the_image():
    assert grid_for(8, 16, 0.25) == (4, 8)
    assert grid_for(4, 4, 0.001) == (1, 1)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(str(tiny_eval.save_model(tmp_path_factory.mktemp("model"))))


def test_a_smaller_image_runs_through_encoder_and_llm_with_that_many_tokens(loaded):
    model, processor = loaded
    red_left = Image.new("RGB", (100, 56), "blue")
    red_left.paste("red", (0, 0, 50, 56))
    small = Downsampler(model, processor, 0.25)
    inputs = small.inputs([[user_turn([red_left], "word1 word2")]])
    assert inputs["pixel_values"].shape == (1, 3, 28, 28)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 4
    # the same picture, smaller: red on the left, blue on the right
    assert (inputs["pixel_values"][0, 0, :, :10] > inputs["pixel_values"][0, 0, :, -10:]).all()

    seen = []
    handle = model.base_model.vision_tower.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape), with_kwargs=True
    )
    with small.interpolated(), torch.inference_mode():
        model(**inputs)
    handle.remove()
    assert seen == [(1, 1 + 4, 32)]
    with pytest.raises(ValueError, match="doesn't match model"):  # the hook is off again
        model(**inputs)


def test_every_image_of_a_prompt_is_smaller(loaded):
    small = Downsampler(*loaded, 0.25)
    pair, single = [Image.new("RGB", (56, 56)), Image.new("RGB", (100, 56))], [Image.new("RGB", (56, 56))]
    inputs = small.inputs([[user_turn(pair, "word1")], [user_turn(single, "word1")]])
    assert inputs["pixel_values"].shape == (3, 3, 28, 28)
    assert (inputs["input_ids"] == loaded[0].config.image_token_id).sum(1).tolist() == [8, 4]
    turn = user_turn(single, "word1")
    turn["content"].append({"type": "video", "video": "clip.mp4"})
    with pytest.raises(UnsupportedStageError, match="images or videos, not both"):
        small.inputs([[turn]])


def test_the_view_is_cropped_and_resized_like_the_encoders_input(loaded):
    _, processor = loaded
    wide = Image.new("RGB", (168, 56), "white")
    wide.paste("black", (56, 0, 112, 56))
    assert processed_view(processor, wide).tobytes() == Image.new("RGB", (56, 56), "black").tobytes()
