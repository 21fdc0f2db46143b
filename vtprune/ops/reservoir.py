# SPDX-License-Identifier: Apache-2.0
"""What a stream of images leaves behind (TCA): a few certain and typical samples of every class."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vtprune.ops.similarity import similarity_to


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the softmax over the last dimension: ``(..., classes)`` -> ``(...)`` float32."""
    logarithms = logits.float().log_softmax(dim=-1)
    return -(logarithms.exp() * logarithms).sum(dim=-1)


def nearest_anchor(anchors: Tensor, cls: Tensor) -> Tensor:
    """The anchor with the largest cosine to the CLS token of each sample; of equal ones the first.

    Args:
        anchors: ``(classes, dim)``, of one layer.
        cls: ``(batch, dim)``, the CLS tokens on the input of the next layer.

    Returns:
        ``(batch, dim)`` in the dtype of ``cls``.
    """
    best = similarity_to(cls, anchors.unsqueeze(0)).argmax(dim=1)
    return anchors[best].to(cls)


class Reservoir:
    """CLS tokens of the samples seen so far, a few for each class that was predicted (TCA, arXiv 2410.14729).

    A sample goes to the class that the uncorrected logits predict. If a class has too many, one is removed: the one
    with the largest sum of its entropy and its mean cosine to the others, where CLS tokens are averaged over layers.
    Nothing here waits for the device, except :meth:`anchors`.
    """

    def __init__(self, classes: int, size: int, layers: int, dim: int, *, device: torch.device | str | None = None):
        """
        Args:
            classes: number of classes.
            size: number of samples that a class keeps, at least 1.
            layers: number of encoder layers.
            dim: width of the encoder.
            device: where the samples are kept.
        """
        with torch.inference_mode(False):  # samples are inserted in any mode
            self.entropies = torch.full((classes, size), torch.inf, device=device)
            """(classes, size) float32, ascending; inf where nothing is kept yet."""
            self.cls = torch.zeros(classes, size, layers, dim, device=device)
            """(classes, size, layers, dim) float32: the CLS tokens after each layer, in the same order."""

    def to(self, device: torch.device | str) -> None:
        """Move the samples to a device."""
        with torch.inference_mode(False):
            self.entropies, self.cls = self.entropies.to(device), self.cls.to(device)

    @torch.no_grad()
    def observe(
        self, cls: Tensor, entropies: Tensor, predictions: Tensor, *, scale: float, beta: float, strength: float
    ) -> Tensor:
        """Insert samples, and say how much the logits of each change.

        A sample of the reservoir adds ``strength * exp(-beta * (1 - affinity))`` to the logit of its class. The
        affinity is the mean over layers of the cosine of the CLS tokens, with weights that grow with the layer,
        ``exp(depth / scale)`` for depths from 0 to 1.

        The reference takes one sample at a time. Here, the samples of a batch are inserted in order, and a sample is
        compared with all up to itself, itself included: the same as one by one.

        Args:
            cls: ``(batch, layers, dim)``, the CLS token after each layer.
            entropies: ``(batch,)``, see :func:`entropy`.
            predictions: ``(batch,)`` long, the class of the largest logit.
            scale: > 0; with a small scale only the last layers count.
            beta: how fast a sample counts less the less similar it is, > 0.
            strength: factor on the sum, called lambda in the paper.

        Returns:
            ``(batch, classes)`` float32, to be added to the logits.
        """
        depths = torch.linspace(0, 1, cls.shape[1], device=self.cls.device)
        layer_weights = (depths / scale).softmax(dim=0)
        corrections = []
        for own, value, label in zip(cls.to(self.cls), entropies.to(self.cls), predictions, strict=True):
            self._insert(own, value, label.to(self.cls.device).view(1))
            affinity = cosine_similarity(self.cls, own, dim=-1) @ layer_weights
            votes = torch.exp(-beta * (1 - affinity)).masked_fill(self.entropies.isinf(), 0)
            corrections.append(strength * votes.sum(dim=1))
        return torch.stack(corrections)

    def _insert(self, cls: Tensor, value: Tensor, label: Tensor) -> None:
        """cls: (layers, dim); value: () entropy; label: (1,) long."""
        values = torch.cat([self.entropies[label][0], value.view(1)])
        tokens = torch.cat([self.cls[label][0], cls.unsqueeze(0)])
        typical = normalize(tokens.mean(dim=1), dim=-1)
        likeness = typical @ typical.T
        others = (likeness.sum(dim=1) - likeness.diagonal()) / max(len(tokens) - 1, 1)
        places = torch.arange(len(values), device=values.device)
        # Where a place was free, it has the largest sum, and nothing is lost.
        worst = places == (values + others).argmax()
        order = values.masked_fill(worst, torch.inf).argsort(stable=True)[:-1]
        self.entropies[label] = values[order].unsqueeze(0)
        self.cls[label] = tokens[order].unsqueeze(0)

    def anchors(self) -> Tensor | None:
        """The mean CLS tokens of every class: ``(classes, layers, dim)``; None until every class has two samples."""
        kept = self.entropies.isfinite()
        counts = kept.sum(dim=1)
        if not bool((counts > 1).all()):
            return None
        return (self.cls * kept[..., None, None]).sum(dim=1) / counts.view(-1, 1, 1)
