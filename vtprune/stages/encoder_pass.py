# SPDX-License-Identifier: Apache-2.0
"""What is known of a batch of images on its way through the layers of a vision encoder."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtprune.ops.multi_criteria_fusion import OneStepAhead
from vtprune.ops.token_reduction import Reduction


@dataclass
class EncoderPass:
    """One batch of images on its way through the layers. All tensors are of the batch's tokens, prefix included."""

    images: int
    tokens: int
    """Tokens of an image that enter the first layer."""
    schedule: list[int]
    """How many tokens each layer is to take away."""
    entered: list[int] = field(default_factory=list)
    """Tokens that each layer's attention ran on so far, an extra row included."""
    in_mlp: list[int] = field(default_factory=list)
    """Tokens that the MLP of each layer so far ran on."""
    left: list[int] = field(default_factory=list)
    """Tokens behind each layer so far."""
    sizes: Tensor | None = None
    """(images, rows) float32: patches that each row stands for; None: nothing was merged so far."""
    sources: Tensor | None = None
    """(images, tokens) long: the row that each token went into, -1 if dropped; None: each is its own."""
    recorded: dict[str, Tensor] = field(default_factory=dict)
    """What a layer's attention was called with, and what projections of it put out."""
    reduced: Tensor | None = None
    """(images, rows, dim): the residual stream of this layer behind a reduction, until the MLP has run."""
    branch: Tensor | None = None
    """What the layer's MLP adds to it."""
    ahead: OneStepAhead | None = None
    """What this layer's attention is to be; None: what it computes."""
    selection_flops: int = 0
    """FLOPs of the method's choices so far; only if they are counted."""
    extra: Tensor | None = None
    """(images, 1, dim), behind the first norm: what this layer's attention reads besides the rows; None: nothing."""

    def apply(self, reduction: Reduction) -> None:
        """Follow the tokens through a reduction."""
        self.sizes = reduction.sizes(self.sizes)
        self.sources = reduction.trace(self.sources)

    @property
    def places(self) -> Tensor:
        """(images, rows) long: the first token of each row, once there are sources."""
        rows = self.sizes.shape[1]
        first = self.sources.new_full((self.images, rows + 1), self.tokens)
        into = self.sources.masked_fill(self.sources < 0, rows)
        numbers = torch.arange(self.tokens, device=into.device).expand(self.images, -1)
        return first.scatter_reduce(1, into, numbers, "amin")[:, :rows]

    def to(self, device: torch.device) -> None:
        """Follow the layers to the device that they are on."""
        if self.sizes is not None and self.sizes.device != device:
            self.sizes, self.sources = self.sizes.to(device), self.sources.to(device)
