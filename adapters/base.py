# SPDX-License-Identifier: Apache-2.0
"""What an adapter states about a model family: where its parts are and how its visual tokens are laid out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from vtprune.tokens import Grid, ModelShape


class Adapter(ABC):
    """Facts about one loaded model. One subclass a model family; it holds the model and changes nothing in it.

    Subclasses set `model_types` and implement the abstract properties; the defaults fit models whose encoder layers
    have an attention module with separate `q_proj` and `k_proj`.
    """

    model_types: ClassVar[tuple[str, ...]]
    """Values of `model.config.model_type` this adapter is for."""
    family: ClassVar[str]
    """What people call the family, for tables."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.config = model.config

    @classmethod
    def refuses(cls, config) -> str | None:
        """Why a config of this family is not supported after all; None if it is."""
        return None

    @property
    def base(self) -> nn.Module:
        """The module whose forward takes `input_ids` and pixels and calls the language model."""
        return self.model.base_model

    @property
    def language_model(self) -> nn.Module:
        """The decoder, called with `inputs_embeds`; has `layers` and `rotary_emb`."""
        return self.model.get_decoder()

    @property
    def decoder_layers(self) -> Sequence[nn.Module]:
        return self.language_model.layers

    @property
    def text_config(self):
        return self.config.get_text_config()

    @property
    @abstractmethod
    def vision_tower(self) -> nn.Module:
        """The vision encoder; called once for all images of a batch."""

    @property
    @abstractmethod
    def encoder_layers(self) -> Sequence[nn.Module]:
        """The encoder's transformer layers."""

    @property
    @abstractmethod
    def projector(self) -> nn.Module:
        """Maps encoder features (images, tokens, dim) to the LLM's width, token by token."""

    @property
    @abstractmethod
    def visual_token_ids(self) -> tuple[int, ...]:
        """Placeholder ids that stand for visual tokens in `input_ids`."""

    @property
    @abstractmethod
    def shape(self) -> ModelShape:
        """Depths, and whether there is a CLS token."""

    @abstractmethod
    def grid(self, tokens: int) -> Grid | None:
        """Layout of an image that has this many visual tokens; None if it has no grid."""

    @property
    @abstractmethod
    def tokens_per_image(self) -> int:
        """Visual tokens of one image according to the config."""
