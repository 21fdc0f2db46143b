# SPDX-License-Identifier: Apache-2.0
"""Images with one digit and their corruptions: the same everywhere. The CLIP that travels along has learned them."""

import hashlib

import numpy as np
import open_clip
import pytest
import torch

import vtprune
from vtprune.classify import ZeroShotClassifier
from vtprune.eval import digitscenes
from vtprune.eval.digitscenes.corruptions import CORRUPTIONS, corrupt
from vtprune.eval.digitscenes.labelled import LARGEST, draw_labelled
from vtprune.eval.digitscenes.open_clip_model import (
    OPEN_CLIP_NAME,
    VOCABULARY,
    build_open_clip,
    build_open_clip_tokenizer,
)
from vtprune.eval.digitscenes.scenes import COLOURS


@pytest.fixture(scope="module")
def trained():
    return digitscenes.load_open_clip()


def accuracy(trained, task: str, **options) -> float:
    """Share of 200 held-out images that are classified right."""
    model, tokenizer, preprocess = trained
    items = digitscenes.labelled_images(limit=200, **options)
    classes, templates = digitscenes.CLASSES[task], digitscenes.TEMPLATES[task]
    said = ZeroShotClassifier(model, tokenizer, classes, templates, preprocess=preprocess).predict(
        [item.image for item in items]
    )
    return float(np.mean([name == getattr(item, task) for name, item in zip(said, items, strict=True)]))


def test_same_images_everywhere():
    items = digitscenes.labelled_images(limit=20)
    parts = [item.image.tobytes() + f"{item.digit}{item.colour}{item.index}".encode() for item in items]
    assert (
        hashlib.sha256(b"".join(parts)).hexdigest()
        == "8c614d77cecd50e44f24400523796026f3f1595c07c6920f43c313c041826c41"
    )
    parts = [
        item.image.tobytes()
        for name in CORRUPTIONS
        for severity in (1, 2, 3)
        for item in digitscenes.labelled_images(limit=3, corruption=name, severity=severity)
    ]
    assert (
        hashlib.sha256(b"".join(parts)).hexdigest()
        == "ef70e53c07204bfb19a8b9f88193bbb6c97a12b9f3492266e09122e2e2926e67"
    )


def test_a_set_is_a_prefix_of_a_larger_one_and_others_are_other_sets():
    items = digitscenes.labelled_images(limit=30)
    shorter = digitscenes.labelled_images(limit=10)
    assert [i.image.tobytes() for i in items[:10]] == [i.image.tobytes() for i in shorter]
    seen = {i.image.tobytes() for i in items}
    for other in ({"seed": 1}, {"split": "train"}, {"split": "validation"}):
        assert not seen & {i.image.tobytes() for i in digitscenes.labelled_images(limit=30, **other)}
    assert {i.image.size for i in items} == {(168, 168)} and {i.image.mode for i in items} == {"RGB"}


def test_the_label_is_what_is_drawn():
    """Where the box has most of its colour, it is the colour of the label; all classes occur."""
    values, colours = set(), set()
    for number in range(150):
        pixels, value, colour, (x, y, side) = draw_labelled(np.random.RandomState(number), "test")
        values.add(value)
        colours.add(colour)
        assert min(x, y) >= 0 and max(x, y) + side <= 168 and side <= LARGEST
        box = pixels[y : y + side, x : x + side].reshape(-1, 3).astype(int)
        exact = {name: (np.abs(box - tint).sum(1) == 0).sum() for name, tint in COLOURS.items()}
        assert max(exact, key=exact.get) == colour and exact[colour] >= 40
    assert values == set(range(10)) and colours == set(COLOURS)


def test_corruptions_are_what_they_say():
    rng = np.random.RandomState(0)
    flat = np.full((168, 168, 3), 128, np.uint8)
    for severity, deviation in ((1, 24), (2, 48)):
        noisy = corrupt(flat, "noise", severity, rng).astype(float)
        assert abs(noisy.std() - deviation) < 0.03 * deviation and abs(noisy.mean() - 128) < 1
    point = np.zeros((65, 65, 3), np.uint8)
    point[20:45, 32] = 255  # a line: only the direction across it is measured
    for severity, deviation in ((1, 2), (2, 3), (3, 4)):
        profile = corrupt(point, "blur", severity, rng)[32, :, 0].astype(float)
        spread = (profile * (np.arange(65) - 32) ** 2).sum() / profile.sum()
        assert abs(spread**0.5 - deviation) < 0.15 * deviation
        assert np.array_equal(corrupt(flat, "blur", severity, rng), flat)
    ramp = np.arange(0, 200, 2, dtype=np.uint8)[None, :, None].repeat(4, 0).repeat(3, 2)
    for severity, percent in ((1, 45), (2, 30), (3, 20)):
        weak = corrupt(ramp, "contrast", severity, rng).astype(float)
        assert abs(weak.std() / ramp.std() - percent / 100) < 0.02 and abs(weak.mean() - ramp.mean()) < 1.5


@pytest.mark.parametrize(("name", "severity"), [("fog", 1), ("noise", 0), ("noise", 4)])
def test_unknown_corruptions(name, severity):
    with pytest.raises(ValueError, match=f"corruption '{name}' of severity {severity}: expected one of noise, blur"):
        digitscenes.labelled_images(limit=1, corruption=name, severity=severity)


def test_saved_files_match_the_code(trained):
    model, tokenizer, _ = trained
    files = [f for f in digitscenes.OPEN_CLIP_PATH.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 8e6
    fresh, _ = build_open_clip()
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert not model.training and type(model) is open_clip.CLIP and OPEN_CLIP_NAME in open_clip.list_models()
    assert tokenizer.tokenizer.convert_ids_to_tokens(range(len(VOCABULARY))) == VOCABULARY
    texts = ["A photo of the digit 7.", "a red 7 on a table", "a " * 30]
    built = build_open_clip_tokenizer()
    ids = built(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokenizer(texts), ids) and ids.shape == (3, model.context_length)
    # open_clip reads a text's feature at the largest id.
    assert [VOCABULARY[i] for i in ids.max(1).values] == ["</s>"] * 3 and len(VOCABULARY) == model.vocab_size
    words = {word for of_task in digitscenes.TEMPLATES.values() for text in of_task for word in text.split()} - {"{}"}
    assert words <= set(VOCABULARY)


def test_preprocessing_is_that_of_training(trained):
    item = digitscenes.labelled_images(limit=1)[0]
    pixels = torch.from_numpy(np.array(item.image)).permute(2, 0, 1)
    torch.testing.assert_close(trained[2](item.image), (pixels / 255 - 0.3) / 0.3)


def test_checkpoint_classifies_held_out_digits(trained):
    assert accuracy(trained, "digit") >= 0.85
    assert accuracy(trained, "colour") >= 0.95


def test_corruptions_cost_accuracy_and_leave_some(trained):
    """What the adaptation methods are measured on: well below the clean images, well above chance (10 %)."""
    clean = accuracy(trained, "digit")
    for name in CORRUPTIONS:
        assert 0.15 <= accuracy(trained, "digit", corruption=name, severity=2) <= clean - 0.05, name


def test_merging_keeps_what_random_merging_loses(trained):
    """Half of the patches, by similarity and at random."""
    with vtprune.prune(trained[0], "tome", keep_ratio=0.5):
        similar = accuracy(trained, "digit")
    with vtprune.prune(trained[0], {"name": "tome", "variant": "random", "keep_ratio": 0.5}):
        at_random = accuracy(trained, "digit")
    assert similar >= accuracy(trained, "digit") - 0.03
    assert at_random <= similar - 0.1
