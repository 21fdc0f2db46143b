# SPDX-License-Identifier: Apache-2.0
"""What an adapter states about hidden states between decoder layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class LayerStates:
    """The hidden states that a language model hands from layer to layer, and what it makes of them.

    The *states* of a token are all that a layer is handed of it. The defaults fit layers that are handed one hidden
    state a token, and norm it before their attention.
    """

    language_model: Any

    @property
    def final_norm(self) -> Any:
        """What the language model normalises the output of its last layer with."""
        return self.language_model.norm

    @property
    def states_width(self) -> int:
        """Width of the states of a token."""
        return self.language_model.config.hidden_size

    def token_states(self, hidden: Tensor) -> Tensor:
        """(batch, n, width): the states of each token, from what a decoder layer is called with, or puts out."""
        return hidden

    def layer_input(self, states: Tensor) -> Tensor:
        """What a decoder layer is called with for states (batch, n, width)."""
        return states

    def normed(self, states: Tensor) -> Tensor:
        """(batch, n, dim): what the language model would put out if states (batch, n, width) left its last layer."""
        return self.final_norm(states)

    def attention_input(self, layer: Any, states: Tensor) -> Tensor:
        """(batch, n, dim): what a decoder layer hands its attention module for states (batch, n, width)."""
        return layer.input_layernorm(states)
