# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification: logits against the model's own, by hand, and under hooks on the vision encoder."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_clip import transformers_model
from transformers import CLIPImageProcessor, CLIPProcessor, CLIPVisionConfig, CLIPVisionModel

import vtprune
from vtprune.classify import ZeroShotClassifier
from vtprune.errors import ConfigError, UnsupportedModelError
from vtprune.eval import digitscenes
from vtprune.eval.digitscenes.open_clip_model import build_open_clip_tokenizer

CLASSES = ["red", "green", "blue"]
TEMPLATES = ["a {} digit", "an image of a {} digit", "{}"]


@pytest.fixture(scope="module")
def trained():
    return digitscenes.load_open_clip()


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 168, 168, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_open_clip_by_hand(trained, pixels):
    model, tokenizer, _ = trained
    classifier = ZeroShotClassifier(model, tokenizer, CLASSES, TEMPLATES)
    image = F.normalize(model.encode_image(pixels), dim=-1)
    rows = []
    for name in CLASSES:
        each = [F.normalize(model.encode_text(tokenizer([t.format(name)]))[0], dim=0) for t in TEMPLATES]
        rows.append(F.normalize(torch.stack(each).mean(0), dim=0))
    torch.testing.assert_close(classifier.text_features, torch.stack(rows))
    torch.testing.assert_close(classifier.image_features(pixels), image)
    torch.testing.assert_close(classifier(pixels), model.logit_scale.exp() * image @ torch.stack(rows).T)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_transformers_logits_are_the_models_own(kind):
    """With one template, logits are those of the model's own call, and so is SigLIP's bias."""
    model, tokenizer = transformers_model(kind), build_open_clip_tokenizer()
    pixels = torch.randn(2, 3, 28, 28)
    ids = tokenizer([f"a {name} digit" for name in CLASSES], padding="max_length", return_tensors="pt").input_ids
    expected = model(input_ids=ids, pixel_values=pixels).logits_per_image
    logits = ZeroShotClassifier(model, tokenizer, CLASSES, ["a {} digit"])(pixels)
    torch.testing.assert_close(logits, expected)
    assert logits.shape == (2, 3) and logits.std() > 0


@torch.no_grad()
def test_a_processor_gives_tokenizer_and_preprocessing():
    size = {"height": 28, "width": 28}
    processor = CLIPProcessor(CLIPImageProcessor(size=size, do_center_crop=False), build_open_clip_tokenizer())
    model = transformers_model("clip")
    images = [Image.fromarray(np.random.RandomState(i).randint(0, 256, (40, 50, 3), np.uint8)) for i in range(4)]
    classifier = ZeroShotClassifier(model, processor, CLASSES)
    logits = classifier(processor(images=images, return_tensors="pt")["pixel_values"])
    assert classifier.predict(images) == [CLASSES[i] for i in logits.argmax(1).tolist()]


@torch.no_grad()
def test_predict_names_the_classes(trained):
    model, tokenizer, preprocess = trained
    items = digitscenes.labelled_images(limit=20)
    classifier = ZeroShotClassifier(
        model, tokenizer, digitscenes.CLASSES["colour"], digitscenes.TEMPLATES["colour"], preprocess=preprocess
    )
    said = classifier.predict([item.image for item in items])
    assert said == classifier.predict(torch.stack([preprocess(item.image) for item in items]))
    assert np.mean([name == item.colour for name, item in zip(said, items, strict=True)]) >= 0.85


@pytest.mark.parametrize("first", ["classifier", "session"])
@torch.no_grad()
def test_a_session_changes_images_only(trained, pixels, first):
    """Opened before or after: features of classes stay, those of images follow the tower."""
    model, tokenizer, _ = trained
    free = ZeroShotClassifier(model, tokenizer, CLASSES, TEMPLATES)
    before = free(pixels)
    if first == "classifier":
        classifier = ZeroShotClassifier(model, tokenizer, CLASSES, TEMPLATES)
    with vtprune.prune(model, "tome", keep_ratio=0.1) as session:
        if first == "session":
            classifier = ZeroShotClassifier(model, tokenizer, CLASSES, TEMPLATES)
        image, logits = F.normalize(model.encode_image(pixels), dim=-1), classifier(pixels)
    assert session.report.final_tokens == 14
    assert torch.equal(classifier.text_features, free.text_features)
    torch.testing.assert_close(logits, model.logit_scale.exp() * image @ free.text_features.T)
    assert (logits - before).abs().max() > 0.01
    assert torch.equal(classifier(pixels), before)


def test_texts_are_encoded_once_for_each_set_of_classes(trained, pixels, monkeypatch):
    model, tokenizer, _ = trained
    calls = []
    encode = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda ids, **more: calls.append(len(ids)) or encode(ids, **more))
    classifier = ZeroShotClassifier(model, tokenizer, CLASSES, TEMPLATES)
    with torch.no_grad():
        three = classifier(pixels)
        classifier(pixels)
        assert calls == [9]
        classifier.set_classes(["blue", "red"], TEMPLATES)
        two = classifier(pixels)
    assert calls == [9, 6] and classifier.classes == ("blue", "red")
    torch.testing.assert_close(two, three[:, [2, 0]])


def test_gradients_reach_the_pixels_and_not_the_texts(trained, pixels):
    model, tokenizer, _ = trained
    classifier = ZeroShotClassifier(model, tokenizer, CLASSES)
    pixels.requires_grad_()
    classifier(pixels).sum().backward()
    assert pixels.grad.abs().sum() > 0 and not classifier.text_features.requires_grad
    model.zero_grad()


@torch.no_grad()
def test_a_model_in_another_dtype(trained, pixels):
    model, tokenizer, _ = digitscenes.load_open_clip()
    expected = ZeroShotClassifier(model, tokenizer, CLASSES, TEMPLATES)
    logits = expected(pixels)
    torch.testing.assert_close(
        ZeroShotClassifier(model.double(), tokenizer, CLASSES, TEMPLATES)(pixels).float(), logits
    )
    torch.testing.assert_close(expected(pixels).float(), logits, atol=1e-3, rtol=1e-3)  # the model changed, not it


@pytest.mark.parametrize(
    ("classes", "templates", "message"),
    [
        ([], ["{}"], "classes"),
        ("red", ["{}"], "classes: 'red'"),
        (["red", "blue", "red"], ["{}"], "classes: red more than once"),
        (["red"], [], "templates"),
        (["red"], "a {}", "templates: 'a {}'"),
        (["red"], ["a {}", "a digit"], "templates: 'a digit' has no {}"),
    ],
)
def test_malformed_classes_and_templates(trained, classes, templates, message):
    model, tokenizer, _ = trained
    with pytest.raises(ConfigError, match=message):
        ZeroShotClassifier(model, tokenizer, classes, templates)


def test_other_models_are_refused_by_name(trained):
    model, tokenizer, _ = trained
    vision = CLIPVisionModel(CLIPVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(UnsupportedModelError, match="CLIPVisionModel cannot classify.*CLIPModel"):
        ZeroShotClassifier(vision, tokenizer, CLASSES)
    with pytest.raises(UnsupportedModelError, match="VisionTransformer cannot"):
        ZeroShotClassifier(model.visual, tokenizer, CLASSES)


def test_images_without_preprocessing(trained):
    model, tokenizer, _ = trained
    with pytest.raises(ConfigError, match="preprocess="):
        ZeroShotClassifier(model, tokenizer, CLASSES).predict([Image.new("RGB", (168, 168))])
