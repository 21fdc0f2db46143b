# SPDX-License-Identifier: Apache-2.0
"""Gemma 3n: images of one size, seen by a MobileNet, and a decoder with several streams of hidden states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor, nn

from vtprune.adapters.base import Adapter
from vtprune.adapters.fast_vlm import FastVLM
from vtprune.tokens import Grid, Medium
from vtprune.transformers_private import gemma3n_attention_input, gemma3n_output


class Gemma3n(Adapter):
    """`Gemma3nForConditionalGeneration` (no paper).

    The encoder, a MobileNet-V5, halves rows and columns several times and joins its last two feature maps in one of a
    fixed size; it has no CLS token. Tokens of an image: the places of that map in raster order, with "start of image"
    and "end of image" around them and blank lines around these. Sound is text here: its tokens all stay.

    The last layers read the keys of the last full and the last sliding layer before them, so that nothing can be
    dropped behind these, and embeddings of each token are added in every layer. The language model has several streams
    of hidden states (AltUp). A token's states inside it are those of all streams, side by side.
    """

    model_types: ClassVar[tuple[str, ...]] = ("gemma3n",)
    family = "Gemma 3n"
    layout = "one grid an image"
    merges_in_encoder = False
    layers_unread = FastVLM.layers_unread
    encoder_uncounted = FastVLM.encoder_uncounted
    marker_columns = (2, 2)  # a blank line, "start of image"; "end of image", a blank line

    @property
    def marker_token_ids(self) -> tuple[int, ...]:
        names = ("boi_token_id", "eoi_token_id", "boa_token_id", "audio_token_id", "eoa_token_id")
        return tuple(value for name in names if (value := getattr(self.config, name)) is not None)

    # -- the language model -------------------------------------------------------------------------------------

    @property
    def states_width(self) -> int:
        return self.text_config.altup_num_inputs * self.text_config.hidden_size

    def token_states(self, hidden: Tensor) -> Tensor:
        return rearrange(hidden, "s b n d -> b n (s d)")

    def layer_input(self, states: Tensor) -> Tensor:
        return rearrange(states, "b n (s d) -> s b n d", s=self.text_config.altup_num_inputs)

    def normed(self, states: Tensor) -> Tensor:
        return self.final_norm(gemma3n_output(self.language_model, self.layer_input(states)))

    def attention_input(self, layer: Any, states: Tensor) -> Tensor:
        return gemma3n_attention_input(layer, self.layer_input(states))

    # -- the vision encoder -------------------------------------------------------------------------------------

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_tower.timm_model.blocks

    @property
    def projector(self) -> nn.Module:
        return self.base.embed_vision

    @property
    def image_grid(self) -> Grid:
        side = math.isqrt(self.config.vision_soft_tokens_per_image)
        return Grid(side, side)

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> list[int]:
        return [len(self.image_grid)] * len(inputs["pixel_values"])

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        return [Medium.of_grids(self.image_grid) for _ in features]
