# SPDX-License-Identifier: Apache-2.0
"""The training script of the CLIP: where it starts, what it takes as right, and a whole run in small."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from vtprune.eval import digitscenes
from vtprune.eval.digitscenes import open_clip_model
from vtprune.eval.digitscenes.model import VISUAL_TOKENS
from vtprune.eval.digitscenes.open_clip_model import VOCABULARY, build_open_clip

SCRIPT = "train_digitscenes_clip"


@torch.no_grad()
def test_warm_start_computes_what_the_encoder_of_the_llava_does(script):
    tower = AutoModelForImageTextToText.from_pretrained(digitscenes.MODEL_PATH).model.vision_tower.eval()
    model, _ = build_open_clip()
    script.warm_start(model.visual, tower)
    pixels = torch.randn(2, 3, 168, 168)
    expected = model.visual.ln_post(tower(pixels).last_hidden_state[:, 0]) @ model.visual.proj
    torch.testing.assert_close(model.encode_image(pixels), expected)


@torch.no_grad()
def test_encoding_all_patches_is_the_models_own(script):
    model, _ = build_open_clip()
    pixels, every = torch.randn(2, 3, 168, 168), torch.arange(VISUAL_TOKENS).expand(2, -1)
    torch.testing.assert_close(script.encode_part(model.visual, pixels, every), model.encode_image(pixels))
    fewer = script.encode_part(model.visual, pixels, every[:, :50])
    pixels[..., 84:, :] = 0  # patches from the 72nd on
    torch.testing.assert_close(script.encode_part(model.visual, pixels, every[:, :50]), fewer)


def test_a_batch_names_what_its_captions_say(script):
    pixels, on_digit, names, captions = script.draw_batch(np.random.RandomState(0), 12)
    assert pixels.shape == (12, 3, 168, 168) and on_digit.shape == (12, VISUAL_TOKENS)
    assert len(names) == len(captions) == 24 and set(" ".join(captions).split()) <= set(VOCABULARY)
    for (value, colour), caption in zip(names, captions, strict=True):
        words = set(caption.split())
        assert words & set(digitscenes.CLASSES["digit"]) == ({str(value)} if value is not None else set())
        assert words & set(digitscenes.CLASSES["colour"]) == ({colour} if colour is not None else set())
    fits = script.fitting(names)
    for image in range(12):
        value, colour = names[2 * image]
        for caption in range(24):
            v, c = names[caption]
            assert fits[image, caption] == ((v is None or v == value) and (c is None or c == colour))
    assert all(fits[i, 2 * i] and fits[i, 2 * i + 1] for i in range(12))


def test_loss_is_least_where_all_that_fits_is_equal(script):
    """Two images, three captions, of which the last fits both. The least loss is the entropy of the targets."""
    fits = torch.tensor([[True, False, True], [False, True, True]])
    best = (math.log(2) + math.log(2) / 3) / 2  # an image has two captions; one caption of three has two images
    apart = script.pair_loss(torch.where(fits, 50.0, -50.0), fits)
    torch.testing.assert_close(apart, torch.tensor(best))
    assert script.pair_loss(torch.zeros(2, 3), fits) > best
    uneven = torch.where(fits, 50.0, -50.0)
    uneven[0, 2] = 45
    unlikely = math.log1p(math.exp(-5)) + 2.5  # mean of the two that fit, one of which is 5 below the other
    expected = ((unlikely + math.log(2)) / 2 + unlikely / 3) / 2
    torch.testing.assert_close(script.pair_loss(uneven, fits), torch.tensor(expected))


def test_a_whole_run_in_small(script, tmp_path, monkeypatch, one_thread):
    """What it saves loads as the shipped model does, with the weights that were trained."""
    few = digitscenes.labelled_images(limit=4)
    monkeypatch.setattr(script, "labelled_images", lambda *args, **more: few)
    script.main(tmp_path, save_to=None, steps=2, batch=4, device="cpu", threads=1, seed=0)
    assert {p.name for p in tmp_path.iterdir()} == {"clip.pt", "model", "train.log"}
    names = {p.name for p in (tmp_path / "model").iterdir()}
    assert names == {p.name for p in digitscenes.OPEN_CLIP_PATH.iterdir()}
    weights = torch.load(tmp_path / "clip.pt", weights_only=True)["module"]
    monkeypatch.setattr(open_clip_model, "OPEN_CLIP_PATH", tmp_path / "model")
    model, tokenizer, _ = digitscenes.load_open_clip()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert tokenizer(["a red 7"]).shape == (1, 10)


@pytest.mark.parametrize("start", [0.0, 9.0])
def test_the_saved_scale_is_the_one_that_was_trained_with(script, tmp_path, start):
    """The loss never scales by more than 100."""
    model, _ = build_open_clip()
    torch.nn.init.constant_(model.logit_scale, start)
    script.save(model, tmp_path)
    saved, _ = build_open_clip(tmp_path / "model.safetensors")
    assert saved.logit_scale.item() == pytest.approx(min(start, math.log(100)))
