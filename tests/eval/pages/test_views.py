# SPDX-License-Identifier: Apache-2.0
"""What a run leaves for pages: pictures as the encoder saw them, and where the visual tokens are in them."""

import copy
import inspect
import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import tiny_eval
import tiny_video
import torch
from conformance import processors
from PIL import Image

import vtprune
from vtprune.adapters.llava import Llava
from vtprune.eval.inputs import chat_inputs, load_model
from vtprune.eval.pages import views as pages_views
from vtprune.eval.pages.pictures import Picture, dimmed, seams
from vtprune.eval.pages.views import View, read_views, write_views
from vtprune.eval.tasks import user_turn
from vtprune.testing import families

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # PaliGemma's processor with NumPy 2


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    return load_model(str(tiny_eval.save_model(tmp_path_factory.mktemp("image"))))


@pytest.fixture(scope="module")
def video_model(tmp_path_factory):
    return load_model(str(tiny_video.save_model(tmp_path_factory.mktemp("video"))))


def example(image):
    return tiny_eval.Example(image, "word1 word2", "one", "family")


def pixels(picture: Path) -> np.ndarray:
    return np.asarray(Image.open(picture)).astype(int)


def test_an_image_is_shown_as_cropped_and_resized_for_the_encoder(image_model, tmp_path):
    wide = Image.new("RGB", (112, 56), "white")
    wide.paste("red", (28, 0, 56, 56))  # what is left of the middle of the picture
    write_views(tmp_path, *image_model, [example(wide)], "image")
    ((view, picture),) = read_views(tmp_path).values()
    assert (view.question, view.kind, view.grids) == ("word1 word2", "image", [[4, 4]])
    assert view.places == [[0, row, col] for row in range(4) for col in range(4)]
    seen = pixels(picture)
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
    strip = pixels(picture)
    assert strip.shape == (64, 64 * tiny_video.FRAMES, 3)
    first = tiny_video.clip(0)[0].astype(int)
    assert abs(strip[:, :64] - first).mean() < 12 < abs(strip[:, 64:128] - first).mean()


def test_padding_around_a_mosaic_is_not_shown(video_model, tmp_path):
    square, wide = (Image.new("RGB", size, "white") for size in ((56, 56), (56, 20)))
    write_views(tmp_path, *video_model, [example(square), example(wide)], "image")
    views = read_views(tmp_path)
    assert [views[index][0].grids for index in (0, 1)] == [[[8, 8], [8, 8]], [[8, 8], [2, 8]]]
    view, picture = views[1]
    assert view.widths == [64, 256] and (pixels(picture) > 240).all()  # an overview, and a mosaic four times as wide


def test_several_images_of_a_prompt(image_model, tmp_path):
    """They stand side by side. Where they have tiles, it is not known which are whose, and there is no view."""

    class Two(tiny_eval.Example):
        def conversation(self):
            return [user_turn([self.image, Image.new("RGB", (56, 56), "red")], self.question)]

    two = Two(Image.new("RGB", (56, 56), "white"), "word1 word2", "one", "family")
    write_views(tmp_path / "images", *image_model, [two], "image")
    ((view, picture),) = read_views(tmp_path / "images").values()
    assert (view.grids, view.places[15:17]) == ([[4, 4], [4, 4]], [[0, 3, 3], [1, 0, 0]])
    assert (abs(pixels(picture)[:, 60:] - [255, 0, 0]) < 12).all() and (pixels(picture)[:, :52] > 240).all()
    tiles = families.shared("llava_next"), processor_of("llava_next")
    write_views(tmp_path / "tiles", *tiles, [example(two.image), two], "image")
    assert list(read_views(tmp_path / "tiles")) == [0]


# -- every family -----------------------------------------------------------------------------------------------------

CROPPED = {
    *((name, "image") for name in ("llava", "vipllava", "video_llava")),
    *((name, "video") for name in ("video_llava", "llava_next_video")),
}
"""Families whose processors cut a square out of the middle."""
PADDED = {"deepseek_vl", "janus"}
"""Families whose processors pad images to a square; of these, squares are shown."""
PADDED_CELLS = {"molmo2"}
"""Families whose tokens at the edge may stand for less than their cell."""
CONVOLVED = {"gemma3n", "fast_vlm"}
"""Families whose encoders mix patches otherwise than by attention, so that a token sees others than its own."""
SHARED_EVENLY = [name for name in processors.FAMILIES if name not in PADDED_CELLS]
_FORTY = {"num_frames": 40}
_LARGE = {"size": {"shortest_edge": 300, "longest_edge": 100_000}}  # a limit for all frames together
_VIDEOS: dict[str, dict] = {
    "qwen3_vl": _LARGE,
    "lfm3_vl": _LARGE,
    "gemma4": _FORTY,
    "gemma4_unified": _FORTY,
    "molmo2": _FORTY | {"max_fps": 1000},
    "ernie4_5_vl": {"min_frames": 40, "max_frames": 40} | _LARGE,
}
"""What processors of videos are told, so that they take more frames, or leave more of them."""
WHOLE = {"kimi_k25"}
"""Families whose processors pad images to whole tokens; of these, images of whole tokens of 8 pixels are shown."""
WIDE, TALL = (60, 18), (24, 54)
"""Width and height in pixels. Mosaics of both are padded; from the wide ones all of the padding is cut off."""
PARTS = [part / 6 for part in range(1, 6)]
HALVES = [(axis, bright, at) for axis in ("across", "down") for bright in ("before", "behind") for at in PARTS]
"""Where a picture is bright: before or behind some part of its width or its height. It is black elsewhere."""
BRIGHT, DARK = 0.55, 0.03
"""Brightness of what counts as bright, also where padding is part of it, and as dark in a JPEG."""


def shown_size(family: str, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height that a family's processor does not pad."""
    if family in PADDED:
        return max(size), max(size)
    return tuple(-(-side // 8) * 8 for side in size) if family in WHOLE else size


def half(size: tuple[int, int], axis: str, bright: str, at: float) -> Image.Image:
    corners = [0, 0, *size]
    edge, corner = round(at * size[axis == "down"]), (axis == "down") + 2 * (bright == "before")
    corners[corner] = edge
    image = Image.new("RGB", size)
    image.paste("white", tuple(corners))
    return image


def processor_of(family: str):
    family = processors.ALIKE.get(family, family)
    processor = copy.copy(processors.processor(family))
    marks = {"video": "", **processors._WRITTEN.get(family, processors._DEFAULT)}
    if family in _VIDEOS:
        processor.video_processor = copy.copy(processor.video_processor)
        for name, value in _VIDEOS[family].items():
            setattr(processor.video_processor, name, value)
    if "paligemma" not in family:
        processor.chat_template = (
            "{% for turn in messages %}{% for part in turn['content'] %}"
            f"{{{{ {json.dumps(marks)}[part['type']] if part['type'] != 'text' else part['text'] }}}} "
            "{% endfor %}{% endfor %}:"
        )
    return processor


def features(model, processor, medium, kind: str) -> torch.Tensor:
    """(tokens, dim) of the model itself, but patches do not see one another in its encoder, nor queries in a
    projector the window around them; and patches that there is no encoder for are not normed, which even ones become
    alike by."""

    def unseeing(module, args, output):
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    adapter = vtprune.adapter_for(model)
    encode = getattr(*adapter.encode_call(kind))
    inputs = chat_inputs(processor, [medium], ["who is this"], kind)
    with ExitStack() as stack, torch.inference_mode():
        for layer in adapter.encoder_layers(kind):
            mixer = layer.conv if hasattr(layer, "conv") else adapter.encoder_attention(layer)
            stack.callback(mixer.register_forward_hook(unseeing).remove)
        for module in () if adapter.encoder_layers(kind) else adapter.vision_tower(kind).modules():
            if isinstance(module, torch.nn.LayerNorm):
                stack.callback(module.register_forward_hook(lambda module, args, output: args[0]).remove)
        for module in adapter.projector.modules():
            if type(module).__name__ == "Blip2QFormerMultiHeadAttention":
                stack.callback(module.register_forward_hook(unseeing).remove)
        found = encode(**{name: inputs[name] for name in inspect.signature(encode).parameters if name in inputs})
    return torch.cat([media.flatten(0, -2) for media in adapter.features_of(found)])


def brightness(view, picture: Path) -> np.ndarray:
    """Of each token's part of the picture, 0 to 1; nan where it has none."""
    grey = np.asarray(Image.open(picture).convert("L")) / 255
    lefts = np.cumsum([0, *view.widths])
    assert grey.shape[1] == lefts[-1]
    found = []
    for place in view.places:
        if place is None:
            found.append(np.nan)
            continue
        (number, row, col), (rows, cols) = place, view.grids[place[0]]
        top, bottom = (round(at * len(grey) / rows) for at in (row, row + 1))
        left, right = (lefts[number] + round(at * view.widths[number] / cols) for at in (col, col + 1))
        found.append(grey[top:bottom, left:right].mean())
    return np.array(found)


def expected(view, axis: str, bright: str, at: float, pictures=slice(None)) -> np.ndarray:
    """1 for tokens in the bright half of a medium shown whole, 0 in the dark one, nan near the edge and elsewhere."""
    found = []
    for place in view.places:
        if place is None or place[0] not in range(len(view.grids))[pictures]:
            found.append(np.nan)
            continue
        down = axis == "down"
        cells = view.grids[place[0]][0 if down else 1]
        # Of the padding around a mosaic, or of the image beside it, there may be half a cell.
        near, far = (place[1 if down else 2] - 0.5) / cells, (place[1 if down else 2] + 1.5) / cells
        side = "before" if far <= at else "behind" if near >= at else None
        found.append(np.nan if side is None else side == bright)
    return np.array(found, dtype=float)


def assert_agree(view, shown: np.ndarray, responses: np.ndarray) -> None:
    """What is shown bright is what the model sees bright: all of it more than anything shown dark.

    shown, responses: (..., tokens)
    """
    assert shown.shape == responses.shape
    assert responses[shown > BRIGHT].min() > responses[shown < DARK].max()
    assert not responses[np.isnan(shown)].any()  # tokens without a place see nothing
    grids = [(number, *np.indices(grid).reshape(2, -1)) for number, grid in enumerate(view.grids)]
    cells = [[number, row, col] for number, rows, cols in grids for row, col in zip(rows, cols, strict=True)]
    assert sorted(filter(None, view.places)) == cells  # each of them is one token's


def assert_whole(shown: np.ndarray, expected: np.ndarray) -> None:
    known = ~np.isnan(expected)
    assert known.any()
    assert (abs(shown - expected)[known] < 0.5).all()  # half of a cell at the edge of a mosaic may be padding


def check_image(model, processor, size: tuple[int, int], whole: bool, folder: Path) -> None:
    images = [half(size, *where) for where in HALVES]
    write_views(folder, model, processor, [example(image) for image in images], "image")
    views = read_views(folder)
    shown = np.stack([brightness(*views[index]) for index in range(len(HALVES))])
    black, *seen = (features(model, processor, one, "image") for one in (Image.new("RGB", size), *images))
    view = views[0][0]
    assert_agree(view, shown, np.stack([(one - black).norm(dim=1) for one in seen]))
    placed = [place is not None for place in view.places]
    assert (shown > BRIGHT).any(0)[placed].all() and (shown < DARK).any(0)[placed].all()
    if whole:
        assert_whole(shown, np.stack([expected(view, *where) for where in HALVES]))


@pytest.mark.parametrize("size", [WIDE, TALL], ids=["wide", "tall"])
@pytest.mark.parametrize("family", [name for name in processors.FAMILIES if name not in CONVOLVED])
def test_tokens_of_an_image_are_where_the_model_sees_them(family, size, tmp_path):
    size = shown_size(family, size)
    check_image(families.shared(family), processor_of(family), size, (family, "image") not in CROPPED, tmp_path)


def test_pixels_that_make_no_whole_patch_are_not_shown(tmp_path):
    """LLaVA-OneVision as it is published has tiles of 384 pixels and patches of 14."""
    config = copy.deepcopy(families.shared("llava_onevision").config)
    config.vision_config.image_size, config.image_grid_pinpoints = 30, [[30, 60], [60, 30], [60, 60]]
    processor = processor_of("llava_onevision")
    processor.image_processor = copy.copy(processor.image_processor)
    processor.image_processor.size = {"height": 30, "width": 30}
    processor.image_processor.image_grid_pinpoints = config.image_grid_pinpoints
    torch.manual_seed(0)
    check_image(type(families.shared("llava_onevision"))(config).eval(), processor, (48, 48), False, tmp_path)
    view, picture = read_views(tmp_path)[0]
    assert pixels(picture).shape == (48, 96, 3) and view.grids == [[3, 3], [4, 4]]  # patches of 8 pixels


@pytest.mark.parametrize("family", [name for name in processors.FAMILIES if name in families.VIDEO_NAMES])
def test_tokens_of_a_video_are_where_the_model_sees_them(family, tmp_path):
    """Each half is shown for four frames, so that families which take two together get every one of them."""
    model, processor = families.shared(family), processor_of(family)
    size = shown_size(family, WIDE)
    frames = np.stack([np.asarray(half(size, *where)) for where in HALVES for _ in range(4)])
    for name, clip in (("clip", frames), ("black", 0 * frames)):
        tiny_video.write_clip(tmp_path / f"{name}.mp4", clip)
    clip = tiny_video.Example(tmp_path / "clip.mp4", "word1", "one", "family")
    write_views(tmp_path, model, processor, [clip], "video")
    ((view, picture),) = read_views(tmp_path).values()
    ours, black = (features(model, processor, tmp_path / f"{name}.mp4", "video") for name in ("clip", "black"))
    shown = brightness(view, picture)
    assert_agree(view, shown, (ours - black).norm(dim=1).numpy())
    pictures, left = divmod(len(view.grids), len(HALVES))
    assert pictures and not left  # frames may be sampled
    if (family, "video") not in CROPPED:
        frames = [slice(first, first + pictures) for first in range(0, len(view.grids), pictures)]
        each = [expected(view, *where, own) for where, own in zip(HALVES, frames, strict=True)]
        assert_whole(shown, np.fmax.reduce(each))


@pytest.mark.parametrize(
    "family, kind",
    [(name, kind) for name in SHARED_EVENLY for kind in families.MEDIA[name] if kind != "mixed"],
)
def test_every_picture_shows_the_medium(family, kind, tmp_path):
    """A square one, from which nothing is cut off, and a video of a still."""
    image = processors.picture(48, 48)
    tiny_video.write_clip(tmp_path / "clip.mp4", np.stack([np.asarray(image)] * 8))
    clip = tiny_video.Example(tmp_path / "clip.mp4", "word1", "one", "family")
    medium = example(image) if kind == "image" else clip
    write_views(tmp_path, families.shared(family), processor_of(family), [medium], kind)
    ((view, picture),) = read_views(tmp_path).values()
    strip, left = pixels(picture), 0
    for width in view.widths:
        resized = image.resize((width, len(strip)), Image.Resampling.BICUBIC)
        assert abs(strip[:, left : left + width] - np.asarray(resized)).mean() < 10
        left += width


@pytest.mark.skipif(not families.is_available("nemotron_h_omni"), reason="not in this release of transformers")
def test_a_picture_is_the_mean_of_the_frames_that_share_tokens(tmp_path):
    """Nemotron Omni stacks two frames, and does not say that its processor norms them."""
    model, processor = families.shared("nemotron_h_omni"), processor_of("nemotron_h_omni")
    processor.video_processor = copy.copy(processor.video_processor)
    processor.video_processor.do_sample_frames = False
    stills = [np.asarray(processors.picture(48, 32, number)) for number in (0, 1, 2)]
    tiny_video.write_clip(tmp_path / "clip.mp4", np.stack([stills[0], stills[1], stills[2], stills[2]]))
    clip = tiny_video.Example(tmp_path / "clip.mp4", "word1", "one", "family")
    write_views(tmp_path, model, processor, [clip], "video")
    ((view, picture),) = read_views(tmp_path).values()
    rows, cols = view.grids[0]
    assert view.grids == [[rows, cols]] * 2 and view.places[rows * cols] == [1, 0, 0]
    size = view.widths[0], pixels(picture).shape[0]
    for number, frame in enumerate([np.mean(stills[:2], 0), stills[2]]):
        resized = Image.fromarray(frame.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        shown = pixels(picture)[:, number * size[0] : (number + 1) * size[0]]
        assert abs(shown - np.asarray(resized)).mean() < 12


def test_tiles_are_put_together_and_other_crops_stand_side_by_side(tmp_path, monkeypatch):
    """Tiles may stand before their overview, or behind it."""
    image = processors.picture(60, 23)
    write_views(tmp_path, families.shared("idefics3"), processor_of("idefics3"), [example(image)], "image")
    ((view, picture),) = read_views(tmp_path).values()
    assert (view.grids, view.widths) == ([[3, 6], [3, 3]], [48, 24])
    assert abs(pixels(picture)[:, :48] - np.asarray(image.resize((48, 24))).astype(int)).mean() < 12
    scanning = processor_of("gemma3")
    scanning.images_kwargs = {**scanning.images_kwargs, **processors._PAN_AND_SCAN}
    write_views(tmp_path, families.shared("gemma3"), scanning, [example(image)], "image")
    ((view, picture),) = read_views(tmp_path).values()
    assert (view.grids, view.widths) == ([[4, 4], [4, 12]], [32, 96])
    assert view.places[15:17] == [[0, 3, 3], [1, 0, 0]] and view.places[32] == [1, 0, 4]
    assert abs(pixels(picture)[:, 32:] - np.asarray(image.resize((96, 32))).astype(int)).mean() < 12
    monkeypatch.setattr(pages_views, "_ALIKE", 0)
    write_views(tmp_path, families.shared("gemma3"), scanning, [example(image)], "image")
    ((view, picture),) = read_views(tmp_path).values()
    assert (view.grids, view.widths) == ([[4, 4]] * 4, [32] * 4)
    assert view.places[15:17] == [[0, 3, 3], [1, 0, 0]]


# -- pages and runs ---------------------------------------------------------------------------------------------------


def test_pages_dim_the_places_of_dropped_tokens():
    places = [[0, 0, 0], [0, 0, 1], None, [1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]]
    view = View("word1", "image", [20, 60], [[1, 2], [2, 2]], places)
    picture = Picture("name", 80, 40)
    assert seams(view, picture) == '<path class="seams" d="M20 0v40"/>'
    strokes = "M10 0h10v40h-10z", "M20 0h60v20h-60z", "M50 20h30v20h-30z"
    assert dimmed(view, {0, 2, 5}, picture) == f'<path class="dropped" d="{"".join(strokes)}"/>'


def test_without_a_grid_there_is_no_view(image_model, tmp_path, monkeypatch):
    write_views(tmp_path, *image_model, tiny_eval.examples(1), "image")
    assert list(read_views(tmp_path)) == [0]
    monkeypatch.setattr(Llava, "image_grid", None)
    write_views(tmp_path, *image_model, tiny_eval.examples(1), "image")
    assert not read_views(tmp_path)


def test_pixels_in_no_order_of_pictures_are_not_drawn(tmp_path):
    image = example(processors.picture(48, 48))
    write_views(tmp_path, families.shared("unlimited_ocr"), processor_of("unlimited_ocr"), [image], "image")
    assert not read_views(tmp_path)


def test_views_of_other_versions_are_left_out(image_model, tmp_path):
    write_views(tmp_path, *image_model, tiny_eval.examples(2), "image")
    older = json.loads((tmp_path / "0.json").read_bytes())
    del older["widths"]
    (tmp_path / "0.json").write_text(json.dumps(older))
    assert list(read_views(tmp_path)) == [1]


def test_a_run_writes_views_of_its_task_and_model(image_model, tmp_path):
    from vtprune.eval.config import EvalConfig
    from vtprune.eval.pages.views import views_folder
    from vtprune.eval.running.runner import run

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
