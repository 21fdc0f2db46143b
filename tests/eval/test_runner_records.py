# SPDX-License-Identifier: Apache-2.0
"""The parts of the runner alone: files that survive anything, intervals, grids of smaller images, the plot."""

import numpy as np
import pytest
import torch
from PIL import Image

from vtprune.eval.downsample import Downsampler, grid_for
from vtprune.eval.inputs import load_model, processed_view
from vtprune.eval.results import CellFile, to_line
from vtprune.eval.statistics import mean_interval, retention_interval

BATCHES = [range(0, 3), range(3, 6), range(6, 7)]
RECORDS = [{"index": index, "prediction": "é\n" * index, "score": index / 7} for index in range(7)]


def fill(path):
    file = CellFile(path, BATCHES)
    for batch in file.remaining:
        file.append([RECORDS[index] for index in batch])
    return file


def test_cut_at_any_byte_the_file_is_filled_up_to_the_same_content(tmp_path):
    path = tmp_path / "cell.jsonl"
    assert fill(path).complete
    whole = path.read_bytes()
    ends = [0, *(len(b"".join(map(to_line, RECORDS[: batch.stop]))) for batch in BATCHES)]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        file = CellFile(path, BATCHES)
        assert path.read_bytes() == whole[: max(end for end in ends if end <= cut)]
        assert file.complete == (cut == len(whole))
        assert fill(path).records == RECORDS
        assert path.read_bytes() == whole


def test_everything_behind_a_corrupt_line_is_run_again(tmp_path):
    path = tmp_path / "cell.jsonl"
    fill(path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], b"\0\0\0\n", *lines[5:]]))
    assert CellFile(path, BATCHES).remaining == BATCHES[1:]
    fill(path)
    assert path.read_bytes() == whole


def test_an_ended_cell_stays_ended(tmp_path):
    path = tmp_path / "cell.jsonl"
    CellFile(path, BATCHES).end("under its floor", floor=0.2)
    again = CellFile(path, BATCHES)
    assert (again.complete, again.remaining, again.ending) == (True, [], {"status": "under its floor", "floor": 0.2})


def test_interval_of_a_mean_agrees_with_the_normal_approximation():
    scores = [1.0] * 240 + [0.0] * 160
    mean, (low, high) = mean_interval(scores)
    error = 1.96 * (0.6 * 0.4 / 400) ** 0.5
    assert mean == 0.6
    assert [low, high] == pytest.approx([0.6 - error, 0.6 + error], abs=0.01)
    assert mean_interval(scores) == (mean, [low, high])


def test_retention_is_paired():
    rng = np.random.default_rng(1)
    full = (rng.random(500) < 0.8).astype(float).tolist()
    same = retention_interval(full, full)
    assert same == (1.0, [1.0, 1.0])  # unpaired resampling would not know that these are the same answers
    shuffled = rng.permutation(full).tolist()
    ratio, (low, high) = retention_interval(shuffled, full)
    assert ratio == pytest.approx(1.0)
    assert low < 0.96 and high > 1.04
    assert retention_interval(full, [0.0] * 500) == (None, None)


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
    import tiny_eval

    return load_model(str(tiny_eval.save_model(tmp_path_factory.mktemp("model"))))


def test_a_smaller_image_runs_through_encoder_and_llm_with_that_many_tokens(loaded):
    model, processor = loaded
    red_left = Image.new("RGB", (100, 56), "blue")
    red_left.paste("red", (0, 0, 50, 56))
    small = Downsampler(model, processor, 0.25)
    inputs = small.inputs([red_left], ["word1 word2"])
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


def test_the_view_is_cropped_and_resized_like_the_encoders_input(loaded):
    _, processor = loaded
    wide = Image.new("RGB", (168, 56), "white")
    wide.paste("black", (56, 0, 112, 56))
    assert processed_view(processor, wide).tobytes() == Image.new("RGB", (56, 56), "black").tobytes()
