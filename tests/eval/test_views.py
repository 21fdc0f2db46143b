# SPDX-License-Identifier: Apache-2.0
"""What a run leaves for pages: pictures as the encoder saw them, and where the visual tokens are in them."""

import types

import numpy as np
import pytest
import tiny_eval
import tiny_video
from PIL import Image

from vtprune.eval.inputs import load_model
from vtprune.eval.views import read_views, write_views


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    return load_model(str(tiny_eval.save_model(tmp_path_factory.mktemp("image"))))


@pytest.fixture(scope="module")
def video_model(tmp_path_factory):
    return load_model(str(tiny_video.save_model(tmp_path_factory.mktemp("video"))))


def example(image):
    return types.SimpleNamespace(image=image, question="word1 word2")


def test_an_image_is_shown_as_cropped_and_resized_for_the_encoder(image_model, tmp_path):
    wide = Image.new("RGB", (112, 56), "white")
    wide.paste("red", (28, 0, 56, 56))  # what is left of the middle of the picture
    write_views(tmp_path, *image_model, [example(wide)], "image")
    ((view, picture),) = read_views(tmp_path).values()
    assert (view.question, view.kind, view.grids) == ("word1 word2", "image", [[4, 4]])
    assert view.places == [[0, row, col] for row in range(4) for col in range(4)]
    seen = np.asarray(Image.open(picture)).astype(int)
    assert seen.shape == (56, 56, 3)
    assert abs(seen[:, 4:24] - [255, 0, 0]).max() < 12  # JPEG
    assert abs(seen[:, 32:52] - 255).max() < 12


def test_the_frames_of_a_video_stand_side_by_side(video_model, tmp_path):
    examples = tiny_video.examples(2)
    write_views(tmp_path, *video_model, examples, "video")
    views = read_views(tmp_path)
    assert list(views) == [0, 1]
    view, picture = views[0]
    assert view.grids == [[4, 4]] * tiny_video.FRAMES
    assert len(view.places) == tiny_video.TOKENS
    assert view.places[16:18] == [[1, 0, 0], [1, 0, 1]] and view.places[-1] is None  # the newline token
    strip = np.asarray(Image.open(picture)).astype(int)
    assert strip.shape == (64, 64 * tiny_video.FRAMES, 3)
    first = tiny_video.clip(0)[0].astype(int)
    assert abs(strip[:, :64] - first).mean() < 12 < abs(strip[:, 64:128] - first).mean()


def test_an_overview_and_a_tile_are_shown_but_not_what_is_padded(video_model, tmp_path):
    square, wide = (example(tiny_eval.examples(1)[0].image.resize(size)) for size in ((56, 56), (56, 20)))
    write_views(tmp_path, *video_model, [square], "image")
    assert read_views(tmp_path)[0][0].grids == [[8, 8], [8, 8]]
    write_views(tmp_path, *video_model, [wide], "image")  # over the former one
    assert read_views(tmp_path) == {}


def test_a_run_writes_views_of_its_task_and_model(image_model, tmp_path):
    from vtprune.eval.config import EvalConfig
    from vtprune.eval.runner import run
    from vtprune.eval.views import views_folder

    config = EvalConfig(
        model=image_model[0].name_or_path,
        task="tiny",
        limit=3,
        output=tmp_path,
        keep_ratios=(0.5,),
        baselines=("full",),
    )
    (line,) = run(config)
    assert list(read_views(views_folder(tmp_path, line["task"], line["weights"]))) == [0, 1, 2]
