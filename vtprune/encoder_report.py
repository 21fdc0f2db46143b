# SPDX-License-Identifier: Apache-2.0
"""What the last call of a vision encoder kept in each layer, and what that saved. Every number is measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.adapters.encoder import EncoderAdapter
from vtprune.cost import layer_flops
from vtprune.report_table import HEADER, row


def _weights(module: nn.Module) -> int:
    """Elements of the weight matrices (and convolutions) in a module."""
    return sum(weight.numel() for weight in module.parameters() if weight.ndim > 1)


@dataclass(frozen=True)
class LayerWeights:
    """What the FLOPs of an encoder are counted from: elements of weights that every token is multiplied with."""

    patch: int
    """of the patch embedding"""
    attention: tuple[int, ...]
    """a layer each: of its attention"""
    mlp: tuple[int, ...]
    """a layer each: of its MLP"""
    width: int
    """of all heads together"""

    @classmethod
    def of(cls, adapter: EncoderAdapter) -> LayerWeights:
        """Read them off a model."""
        parts = [adapter.parts(layer) for layer in adapter.layers]
        attention = [_weights(part.attention.module) for part in parts]
        first = parts[0].attention
        return cls(
            patch=_weights(adapter.patch_embedding),
            attention=tuple(attention),
            mlp=tuple(_weights(part.mlp) for part in parts),
            width=round(first.heads * first.scale**-2),
        )

    def flops(self, patches: int, entered: tuple[int, ...], in_mlp: tuple[int, ...]) -> int:
        """FLOPs of one image. entered, in_mlp: tokens that enter each layer's attention, and its MLP."""
        layers = zip(self.attention, self.mlp, entered, in_mlp, strict=True)
        return 2 * patches * self.patch + sum(
            layer_flops(attention, self.width, mlp, before, behind) for attention, mlp, before, behind in layers
        )


@dataclass(frozen=True)
class EncoderReport:
    """The last batch of images that an encoder ran in a session. All images of a batch keep the same number of tokens.

    *Patches* are the tokens that stand for a part of the image, merged ones included; CLS, distillation and register
    tokens are the *prefix*.
    """

    model_name: str
    methods: tuple[str, ...]
    images: int
    prefix_tokens: int
    entered: tuple[int, ...]
    """A layer each: tokens of an image, prefix included, that its attention ran on, and an extra row if it read one."""
    in_mlp: tuple[int, ...]
    """A layer each: those that its MLP ran on."""
    left: tuple[int, ...]
    """A layer each: those that left it."""
    tokens: int
    """Tokens of an image, prefix included, that entered the encoder's layers."""
    weights: LayerWeights
    merged_into: Tensor | None
    """(images, tokens) long: the row behind the last layer that each token went into; None: each is its own."""
    selection_flops: int | None = None
    """FLOPs of what the method computes to choose, for the batch, two for each multiply-add of matrix products; None
    unless `profile="flops"`."""

    @property
    def layers(self) -> int:
        return len(self.entered)

    @property
    def original_tokens(self) -> int:
        """Patches of an image."""
        return self.tokens - self.prefix_tokens

    @property
    def final_tokens(self) -> int:
        """Patches of an image that are left behind the last layer."""
        return self.left[-1] - self.prefix_tokens

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """A layer each: patches of an image that are left behind it."""
        return tuple(count - self.prefix_tokens for count in self.left)

    @property
    def keep_ratio(self) -> float:
        """Share of the patches that is left behind the last layer."""
        return self.final_tokens / self.original_tokens

    def sources(self, image: int) -> Tensor:
        """(tokens,) long, prefix included: the row behind the last layer that each token went into, -1 if dropped.

        The encoder's output has the row for each of these tokens again, unless tokens were dropped.
        """
        if not -self.images <= image < self.images:
            raise IndexError(f"image {image}: the report has {self.images} images")
        return torch.arange(self.tokens) if self.merged_into is None else self.merged_into[image].cpu()

    @property
    def encoder_flops(self) -> int:
        """FLOPs of the patch embedding and all layers for the batch, two for each multiply-add.

        What the method itself computes is not among them: see `selection_flops`.
        """
        return self.images * self.weights.flops(self.original_tokens, self.entered, self.in_mlp)

    @property
    def unpruned_encoder_flops(self) -> int:
        """The same had nothing been merged or dropped."""
        whole = (self.tokens,) * self.layers
        return self.images * self.weights.flops(self.original_tokens, whole, whole)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "model": self.model_name,
            "methods": list(self.methods),
            "images": self.images,
            "layers": self.layers,
            "prefix_tokens": self.prefix_tokens,
            "original_tokens": self.original_tokens,
            "final_tokens": self.final_tokens,
            "counts": list(self.counts),
            "keep_ratio": self.keep_ratio,
            "encoder_flops": self.encoder_flops,
            "unpruned_encoder_flops": self.unpruned_encoder_flops,
            "selection_flops": self.selection_flops,
            "sources": [self.sources(image).tolist() for image in range(self.images)],
        }

    def __str__(self) -> str:
        lines = [
            f"vtprune {' + '.join(self.methods)} on {self.model_name}: {self.images} image(s), {self.layers} "
            "encoder layers",
            HEADER,
            row("patches, final", self.final_tokens, self.original_tokens),
            row("encoder GFLOPs", self.encoder_flops / 1e9, self.unpruned_encoder_flops / 1e9),
        ]
        if self.selection_flops is not None:
            lines.append(row("selection GFLOPs", self.selection_flops / 1e9, 0.0))
        lines.append(f"  patches by layer          {', '.join(map(str, self.counts))}")
        return "\n".join(lines)

    __repr__ = __str__
