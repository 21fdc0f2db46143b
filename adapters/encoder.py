# SPDX-License-Identifier: Apache-2.0
"""What an adapter states about a family of vision encoders: where layers have their parts, and which tokens stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from vtprune.adapters.layer_attention import LayerAttention
from vtprune.tokens import ModelShape


@dataclass(frozen=True)
class LayerParts:
    """Where a layer has its parts. It computes `x + a(attention(first_norm(x)))`, then `x + end(mlp(second_norm(x)))`.

    What stands between these parts (LayerScale, drop path) is left to the layer.
    """

    first_norm: nn.Module
    attention: LayerAttention
    second_norm: nn.Module
    """Is called with the residual stream behind the attention."""
    mlp: nn.Module
    end: nn.Module
    """The last module before the second sum; may also be called before the first one."""


class EncoderAdapter(ABC):
    """Facts about one loaded vision encoder, alone or in a model of image and text. One subclass a family; it holds the
    model and changes nothing in it.

    The encoder hands a tensor (batch, tokens, dim) from layer to layer, and asks nowhere between them how long it is.
    """

    family: ClassVar[str]
    """What people call the family, for tables and messages."""

    def __init__(self, model: nn.Module, tower: nn.Module):
        """model: what the user has. tower: the module in it that holds the encoder's layers, or the model itself."""
        self.model = model
        self.tower: Any = tower

    @classmethod
    @abstractmethod
    def find(cls, model: Any) -> nn.Module | None:
        """The encoder of this family in a model; None if the model has none.

        Raises UnsupportedModelError if it has one with parts that are not supported.
        """

    @property
    @abstractmethod
    def layers(self) -> Sequence[nn.Module]:
        """The transformer layers, in the order of the path."""

    @abstractmethod
    def parts(self, layer: Any) -> LayerParts:
        """Where one of the layers has its parts."""

    @property
    @abstractmethod
    def prefix_tokens(self) -> int:
        """How many tokens without a place come first: CLS, distillation and register tokens."""

    @property
    @abstractmethod
    def has_cls(self) -> bool:
        """Whether the first token is a CLS token."""

    @property
    @abstractmethod
    def patch_embedding(self) -> nn.Module:
        """The convolution that makes patches of pixels."""

    @property
    @abstractmethod
    def recomputes(self) -> bool:
        """Whether layers run a second time in the backward pass (gradient checkpointing)."""

    @property
    def shape(self) -> ModelShape:
        """Depth and `has_cls`; there is no language model."""
        depth = len(self.layers)
        return ModelShape(encoder_layers=depth, decoder_layers=0, feature_layer=depth - 1, has_cls=self.has_cls)


def class_names(module: Any, package: str) -> list[str]:
    """Names of the classes of a module that a package defines, base classes included. The package is not imported."""
    return [cls.__name__ for cls in type(module).__mro__ if cls.__module__.partition(".")[0] == package]
