# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification that adapts to the images it sees, with a pruned vision encoder (TCA, arXiv 2410.14729)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.adapters import find_encoder
from vtprune.adapters.encoder import EncoderAdapter
from vtprune.classify import ZeroShotClassifier
from vtprune.encoder_report import EncoderReport
from vtprune.encoder_session import EncoderSession
from vtprune.errors import ConfigError, UnsupportedModelError
from vtprune.methods import build_method
from vtprune.methods.base import Method
from vtprune.methods.tca import TCA
from vtprune.ops.reservoir import Reservoir, entropy, nearest_anchor


class AdaptingClassifier:
    """A zero-shot classifier that condenses tokens and adapts to the images it sees (TCA, arXiv 2410.14729).

    classifier = ZeroShotClassifier(clip, tokenizer, ["cat", "dog"], ["a photo of a {}"])
    adapting = AdaptingClassifier(classifier, "tca", reservoir=3)
    for pixels in stream:
        logits = adapting(pixels)

    No weight changes. Each image is encoded with the tokens of some layers condensed. Then it is a sample of the class
    that the classifier's logits say. Each class keeps a few samples, which are certain and typical: the CLS token
    behind every layer. By their similarity to the new image they correct its logits; the image itself is among them.
    Once every class has two samples, the mean of each class is its anchor: layers that condense attend to the anchor
    most similar to the CLS token that enters them. With many classes this may never happen.

    The authors chose `scale`, `strength` and `beta` for each data set; values that do not fit cost accuracy.

    The order of the images matters. The reference takes one at a time; here, a batch is its images in order, and all of
    them see the anchors from before the batch. Outside of calls the model is as ever. A call opens a session of its own
    on it, so no other one may be open. An error in a call leaves no hooks and no sample. Threads that use one object
    take turns; calls of the model by other threads meanwhile are not pruned. Samples follow the model to its device, in
    float32.

    classifier: of a model whose vision encoder has a CLS token.
    method: `TCA`, its name or a mapping with `name`, with `reservoir`. Budgets and layers are as in a session.
    parameters: further fields of the method.

    Raises UnsupportedStageError for an encoder without a CLS token, UnsupportedModelError for one whose layers are not
    known, ConfigError for another method or one without `reservoir`, BudgetError.
    """

    def __init__(self, classifier: ZeroShotClassifier, method: Method | str | Mapping[str, Any], **parameters: Any):
        built = build_method(method, **parameters)
        if type(built) is not TCA:
            raise ConfigError(f"{built.name} adapts nothing; methods that do: tca")
        if built.reservoir is None:
            raise ConfigError(f"{built.name}: to adapt, it needs reservoir, reservoir=3 for example")
        self.classifier = classifier
        self.method: TCA = built
        self._samples: int = built.reservoir
        self._session(None)  # for its errors
        self._turn = threading.RLock()
        self._report: EncoderReport | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets all samples. Needed once the classifier has been given other classes."""
        encoder = self._encoder()
        with self._turn:
            self._text_features = self.classifier.text_features
            self._reservoir = Reservoir(
                len(self.classifier.classes),
                self._samples,
                len(encoder.layers),
                len(encoder.parts(encoder.layers[0]).first_norm.get_parameter("weight")),
                device=self._text_features.device,
            )

    def state_dict(self) -> dict[str, Any]:
        """A copy of all samples, for `load_state_dict` and `torch.save`.

        "classes": names. "entropies": (classes, reservoir) float32, inf where there is no sample. "cls": (classes,
        reservoir, layers, dim) float32.
        """
        with self._turn:
            self._check_classes()
            samples = {"entropies": self._reservoir.entropies.clone(), "cls": self._reservoir.cls.clone()}
            return {"classes": list(self.classifier.classes), **samples}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces all samples. Raises ConfigError, and changes nothing, if the state is of other classes, of another
        `reservoir` or of an encoder of another size."""
        with self._turn:
            self._check_classes()
            own = {"entropies": self._reservoir.entropies, "cls": self._reservoir.cls}
            if set(state) != {"classes", *own}:
                raise ConfigError(f"the state has {sorted(state)}, expected {sorted(['classes', *own])}")
            if list(state["classes"]) != list(self.classifier.classes):
                raise ConfigError(
                    f"the state is of the classes {list(state['classes'])}, and this classifier has "
                    f"{list(self.classifier.classes)}"
                )
            for name, samples in own.items():
                if state[name].shape != samples.shape:
                    raise ConfigError(
                        f"the state's {name} are {tuple(state[name].shape)}, and {tuple(samples.shape)} are needed: "
                        "the numbers of classes, of samples of each, of encoder layers, and the encoder's width"
                    )
            for name, samples in own.items():
                samples.copy_(state[name])

    @property
    def report(self) -> EncoderReport | None:
        """What the last call kept in each layer, and what that saved; None before one."""
        return self._report

    def __call__(self, pixels: Tensor) -> Tensor:
        """Corrected logits, (batch, classes), of pixel values, (batch, 3, height, width), which become samples.

        They have the dtype of the classifier's. Gradients are those of its logits; the correction has none. Raises
        ConfigError if the classifier has been given other classes.
        """
        with self._turn:
            self._check_classes()
            session = self._session(self._reservoir.anchors())
            with session, _cls_tokens(session.adapter.layers) as behind:
                logits = self.classifier(pixels)
            correction = self._learn(torch.stack([cls.to(logits.device) for cls in behind], dim=1), logits.detach())
            self._report = session.report
            return (logits.float() + correction).to(logits.dtype)

    @torch.no_grad()
    def predict(self, images: Tensor | Sequence[Any]) -> list[str]:
        """The name of the likeliest class of each image, which becomes a sample. Arguments and errors are those of
        `ZeroShotClassifier.predict`."""
        logits = self(self.classifier.pixels(images))
        return [self.classifier.classes[i] for i in logits.argmax(1).tolist()]

    def _learn(self, cls: Tensor, logits: Tensor) -> Tensor:
        """Take images as samples, and say how much their logits change. cls: (batch, layers, dim)."""
        self._reservoir.to(logits.device)
        return self._reservoir.observe(cls, entropy(logits), logits.argmax(1), **self.method.correction)

    def _session(self, anchors: Tensor | None) -> EncoderSession:
        """A session for a call by this thread. anchors: (classes, layers, dim), or None."""
        thread = threading.current_thread()
        return EncoderSession(
            self.classifier.model,
            self._encoder(),
            [AnchoredTCA.of(self.method, anchors)],
            strict=True,
            follows=lambda: threading.current_thread() is thread,
        )

    def _encoder(self) -> EncoderAdapter:
        encoder = find_encoder(self.classifier.model)
        if encoder is None:
            raise UnsupportedModelError(
                f"the vision encoder of this {type(self.classifier.model).__name__} is none of those that sessions "
                "support: a vision transformer of transformers, timm or open_clip"
            )
        return encoder

    def _check_classes(self) -> None:
        if self.classifier.text_features is not self._text_features:
            raise ConfigError(
                "the classifier has been given other classes or templates, and the samples are of the ones before; "
                "call reset(), which forgets them"
            )


@dataclass(frozen=True, kw_only=True)
class AnchoredTCA(TCA):
    """The condensation of `TCA`, in layers that also attend to an anchor.

    Fields
        anchors: (classes, layers, dim), the means of the CLS tokens behind each layer. A layer reads that one of the
            layer before it which has the largest cosine to the CLS token that enters. Default None: none is read.
    """

    anchors: Any = None

    @classmethod
    def of(cls, method: TCA, anchors: Tensor | None) -> AnchoredTCA:
        """What a method does in one call of an adapting classifier."""
        elsewhere = dict.fromkeys(("reservoir", "scale", "strength", "beta"))
        return cls(**vars(method) | elsewhere, anchors=anchors)

    def extra_row(self, layer: int, hidden: Tensor) -> Tensor | None:
        if self.anchors is None or layer == 0:
            return None
        return nearest_anchor(self.anchors[:, layer - 1].to(hidden.device), hidden[:, 0])


@contextmanager
def _cls_tokens(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Gathers the CLS tokens behind each layer, (batch, dim), of images that this thread encodes."""
    thread, behind = threading.current_thread(), list[Tensor]()

    def take(module: nn.Module, args: tuple, output: Tensor) -> None:
        if threading.current_thread() is thread:
            behind.append(output[:, 0].detach())

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(take).remove)
        yield behind
