# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification with a CLIP, from open_clip or transformers, alone or in a session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtprune.errors import ConfigError, UnsupportedModelError


class ZeroShotClassifier:
    """Classifies images by the similarity of their feature to that of prompts (CLIP, arXiv 2103.00020).

    model, tokenizer, preprocess = digitscenes.load_open_clip()
    classifier = ZeroShotClassifier(model, tokenizer, ["red", "green"], ["a {} digit"], preprocess=preprocess)
    with vtprune.prune(model, "tome", r=8):
        logits = classifier(pixels)
        names = classifier.predict(images)

    The feature of a class is the mean of the normalised features of its prompts, normalised again. It is computed when
    the classes are set, with the text tower, which no session changes. So it does not matter whether a session opens
    before or after. Weights that are changed later need a new classifier or `set_classes`.

    model: a CLIP of open_clip, or `CLIPModel` or `SiglipModel` of transformers; in eval mode, as for any inference.
    tokenizer: that of the model; for a model of transformers its tokenizer or its processor. Prompts longer than the
        model's context are cut off.
    classes: their names, each once.
    templates: prompts with {} for the name; default the name alone.
    preprocess: makes pixel values (3, height, width) from an image; default the image processor of a processor. Only
        `predict` on images needs it.

    Raises UnsupportedModelError for another model; ConfigError for no classes, a name twice, no templates or one
    without {}.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        classes: Sequence[str],
        templates: Sequence[str] = ("{}",),
        *,
        preprocess: Callable[[Any], Tensor] | None = None,
    ):
        self.model: Any = model
        self._towers = _towers(model, tokenizer)
        self._preprocess = preprocess or self._towers.preprocess
        self.set_classes(classes, templates)

    def set_classes(self, classes: Sequence[str], templates: Sequence[str] = ("{}",)) -> None:
        """Takes other classes and templates, and computes their features. Errors as of the constructor."""
        _check(classes, templates)
        self.classes, self.templates = tuple(classes), tuple(templates)
        prompts = [template.replace("{}", name) for name in self.classes for template in self.templates]
        with torch.no_grad():
            features = F.normalize(self._towers.encode_texts(prompts), dim=-1)
            mean = features.unflatten(0, (len(self.classes), len(self.templates))).mean(1)
            self._text_features = F.normalize(mean, dim=-1)

    @property
    def text_features(self) -> Tensor:
        """Normalised features of the classes, (classes, dim)."""
        return self._text_features

    def image_features(self, pixels: Tensor) -> Tensor:
        """Normalised features, (batch, dim), of pixel values, (batch, 3, height, width); moved to the model."""
        return F.normalize(self._towers.encode_images(pixels), dim=-1)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits, (batch, classes), of pixel values, (batch, 3, height, width).

        They are the cosine similarities times the model's scale, plus its bias if it has one (SigLIP).
        """
        image = self.image_features(pixels)
        # The model may have been moved since the classes were set.
        logits = self.model.logit_scale.exp() * image @ self._text_features.to(image).T
        bias = getattr(self.model, "logit_bias", None)
        return logits if bias is None else logits + bias

    @torch.no_grad()
    def predict(self, images: Tensor | Sequence[Any]) -> list[str]:
        """The name of the likeliest class of each image.

        images: pixel values, (batch, 3, height, width), or images that `preprocess` takes. Raises ConfigError if these
        are images and there is no `preprocess`.
        """
        return [self.classes[i] for i in self(self.pixels(images)).argmax(1).tolist()]

    def pixels(self, images: Tensor | Sequence[Any]) -> Tensor:
        """Pixel values, (batch, 3, height, width), of images; what is given as pixel values stays. Errors as of
        `predict`."""
        if isinstance(images, Tensor):
            return images
        if self._preprocess is None:
            raise ConfigError("predict: give pixel values, or images to a classifier that was made with preprocess=")
        return torch.stack([self._preprocess(image) for image in images])


def _check(classes: Sequence[str], templates: Sequence[str]) -> None:
    for name, values in (("classes", classes), ("templates", templates)):
        if isinstance(values, str) or not len(values):
            raise ConfigError(f"{name}: {values!r}, expected a list of at least one text")
    if len(set(classes)) < len(classes):
        twice = sorted({name for name in classes if list(classes).count(name) > 1})
        raise ConfigError(f"classes: {', '.join(twice)} more than once")
    for template in templates:
        if "{}" not in template:
            raise ConfigError(f"templates: {template!r} has no {{}} for the name of the class")


class _OpenClip:
    """Towers of a model of open_clip."""

    preprocess = None

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer

    def encode_texts(self, prompts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(prompts).to(self.model.logit_scale.device))

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels.to(next(self.model.visual.parameters())))


class _Transformers:
    """Towers of a `CLIPModel` or `SiglipModel`."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model = model
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        processor = getattr(tokenizer, "image_processor", None)
        self.preprocess = processor and (lambda image: processor(image, return_tensors="pt")["pixel_values"][0])

    def encode_texts(self, prompts: list[str]) -> Tensor:
        # SigLIP was trained on texts padded to its context, without a mask. CLIP ignores the padding.
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return self.model.get_text_features(input_ids=tokens.input_ids.to(self.model.device)).pooler_output

    def encode_images(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.model.device, self.model.dtype)
        return self.model.get_image_features(pixel_values=pixels).pooler_output


def _towers(model: nn.Module, tokenizer: Any) -> _OpenClip | _Transformers:
    # By name: open_clip is slow to import, and whoever has such a model has imported it.
    kinds = {(kind.__module__.split(".")[0], kind.__name__) for kind in type(model).__mro__}
    if kinds & {("transformers", "CLIPModel"), ("transformers", "SiglipModel")}:
        return _Transformers(model, tokenizer)
    if kinds & {("open_clip", "CLIP"), ("open_clip", "CustomTextCLIP")}:
        return _OpenClip(model, tokenizer)
    raise UnsupportedModelError(
        f"{type(model).__name__} cannot classify by prompts; expected a CLIP of open_clip, or CLIPModel or SiglipModel "
        "of transformers"
    )
