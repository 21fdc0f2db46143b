# SPDX-License-Identifier: Apache-2.0
"""What a language model must be like for tokens to go missing in it."""

from __future__ import annotations

from collections.abc import Sequence

from vtprune.adapters.base import Adapter
from vtprune.errors import UnsupportedStageError
from vtprune.methods.base import AfterPrefill, InLLM, Method
from vtprune.transformers_private import carried, check_decoder, state_kinds


def check_states(adapter: Adapter, methods: Sequence[Method]) -> None:
    """Raise if methods would drop tokens where the language model cannot do without them."""
    decoder, depth = adapter.language_model, len(adapter.decoder_layers)
    check_decoder(decoder)
    states = state_kinds(decoder.config, depth)
    if states and (inside := [part.name for part in methods if isinstance(part, InLLM | AfterPrefill)]):
        raise UnsupportedStageError(
            f"{', '.join(inside)}: tokens cannot be dropped inside this language model, which has layers that "
            f"{carried(states)} ({', '.join(states)}); methods before the LLM work: mmtok, divprune"
        )


def check_length(longest: int | None, length: int) -> None:
    """Raise UnsupportedStageError if a sequence of so many tokens cannot be cut. longest: see `longest_prunable`."""
    if longest is not None and length > longest:
        raise UnsupportedStageError(
            f"{length} tokens are too many to prune: this language model attends in chunks, or scales its queries "
            f"by the tokens before them, and stays right up to {longest} tokens only"
        )
