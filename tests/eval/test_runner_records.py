# SPDX-License-Identifier: Apache-2.0
"""The parts of the runner alone: files that survive anything, intervals, grids of smaller images, the plot."""

import numpy as np
import pytest
import torch
from PIL import Image

from vtprune.eval.inputs import load_model, processed_view
from vtprune.eval.inputs.downsample import Downsampler, grid_for
from vtprune.eval.results.records import CellFile, CellPart, cell_path, part_path
from vtprune.eval.results.statistics import mean_interval, retention_interval
from vtprune.eval.results.status import Refusal

BATCHES = [range(0, 3), range(3, 6), range(6, 7)]
RECORDS = [{"index": index, "prediction": "é\n" * index, "score": index / 7} for index in range(7)]
ENDING = {"status": "under its floor", "reason": "too small", "floor": 0.2}


def fill(path, process=0):
    """Everything that is left to do, by one process."""
    file = CellFile(path, BATCHES)
    part = CellPart(path, process)
    for batch in file.remaining:
        part.append([RECORDS[index] for index in batch])
    file.finish([part])
    return file


def half_done(path, batches, process=0):
    part = CellPart(path, process)
    for batch in batches:
        part.append([RECORDS[index] for index in batch])
    return part_path(path, process)


@pytest.fixture
def path(tmp_path):
    return cell_path(tmp_path, "fastv-0.5", "0123")


@pytest.fixture
def whole(tmp_path):
    other = cell_path(tmp_path / "elsewhere", "fastv-0.5", "0123")
    assert fill(other).records == RECORDS
    return other.read_bytes()


def test_cut_at_any_byte_the_file_is_filled_up_to_the_same_content(path, whole):
    CellFile(path, BATCHES)
    part = half_done(path, BATCHES)
    content = part.read_bytes()
    ends = [index for index in range(len(content) + 1) if content[index : index + 3] in (b"\x1f\x8b\x08", b"")]
    assert len(ends) == 4
    for cut in range(len(content) + 1):
        path.unlink(missing_ok=True)
        part.write_bytes(content[:cut])
        file = CellFile(path, BATCHES)
        whole_batches = sum(end <= cut for end in ends) - 1
        assert file.remaining == BATCHES[whole_batches:]
        assert file.complete == path.exists() == (cut == len(content))
        assert fill(path).records == RECORDS
        assert path.read_bytes() == whole
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("finished", [False, True])
def test_what_is_damaged_is_run_again(path, whole, finished):
    CellFile(path, BATCHES)
    damaged = path if finished else half_done(path, BATCHES)
    content = bytearray(whole)
    second = whole.index(b"\x1f\x8b\x08", 1)
    content[second + 20] ^= 1
    damaged.write_bytes(content)
    assert CellFile(path, BATCHES).remaining == BATCHES[1:]
    fill(path)
    assert path.read_bytes() == whole


def test_parts_of_several_processes_become_one_file_in_order(path, whole):
    CellFile(path, BATCHES)
    half_done(path, [BATCHES[2]], process=1)
    half_done(path, [BATCHES[0], BATCHES[2]], process=3)
    file = CellFile(path, BATCHES)
    assert file.remaining == [BATCHES[1]]
    assert file.records == [*RECORDS[:3], RECORDS[6]]
    assert list(path.parent.iterdir()) == [part_path(path, 0)]
    assert fill(path, process=1).complete
    assert path.read_bytes() == whole
    assert list(path.parent.iterdir()) == [path]


def test_an_ended_cell_stays_ended(path):
    file = CellFile(path, BATCHES)
    half_done(path, BATCHES[:1])
    parts = [CellPart(path, 0), CellPart(path, 1)]
    parts[1].end(Refusal(**ENDING))
    file.finish(parts)
    again = CellFile(path, BATCHES)
    assert (again.complete, again.remaining, again.ending, again.records) == (True, [], ENDING, [])
    assert list(path.parent.iterdir()) == [path]


def test_another_cells_parts_are_left_alone(tmp_path, path):
    other = cell_path(tmp_path, "fastv-0.5", "01234")
    CellFile(path, BATCHES)
    part = half_done(other, BATCHES[:1])
    assert fill(path).records == RECORDS
    assert part.exists()
    assert CellFile(other, BATCHES).remaining == BATCHES[1:]


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
