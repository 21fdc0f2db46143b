# SPDX-License-Identifier: Apache-2.0
"""Attention masks by the mask factories, and attention back ends."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from vtprune.transformers_private.arguments import CACHE


def layer_mask(
    config: Any,
    kind: str,
    hidden: Tensor,
    padding: Tensor | None,
    cache: Cache | None,
    layer: int,
    blocks: Tensor | None,
    window_cuts_blocks: bool,
) -> Any:
    """Attention mask of a decoder layer in the form that its attention back end wants.

    hidden: (batch, n, dim), what enters the layer. padding: (batch, columns) bool or None. blocks: (batch, columns)
    long, columns of one block see one another both ways; None for none. window_cuts_blocks: whether a sliding window
    also limits what a column sees of its own block.
    """
    from transformers import masking_utils as private

    factories = private.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
    factory: Any = factories[kind]
    # The factory of chunks takes blocks from 5.20 on only.
    deviation = {} if blocks is None else {"block_sequence_ids": blocks}
    if blocks is not None and kind == "sliding_attention" and window_cuts_blocks:
        # The factory of sliding masks would let tokens see their whole block.
        factory = factories["full_attention"]
        deviation = {
            "or_mask_function": private.blockwise_overlay(blocks),
            "and_mask_function": private.sliding_window_overlay(config.sliding_window),
        }
    return factory(
        config=config,
        inputs_embeds=hidden,
        attention_mask=padding,
        layer_idx=layer,
        **{CACHE: cache},
        **deviation,
    )


def step_mask(config: Any, kind: str, real: Tensor) -> Tensor | None:
    """`layer_mask` of a single token over the columns `real` (batch, columns) bool of a layer that attends to all of
    them, where that is as simple as it can be; None elsewhere."""
    if kind != "full_attention" or attention_back_end(config) != "sdpa":
        return None
    return real[:, None, None]


def encoder_mask(config: Any, hidden: Tensor, padding: Tensor) -> Any:
    """Attention mask of a vision encoder's layer over `padding` (batch, n) bool."""
    from transformers.masking_utils import create_bidirectional_mask

    return create_bidirectional_mask(config=config, inputs_embeds=hidden, attention_mask=padding)


def unmasked_steps(config: Any) -> bool:
    """Whether a single token on an unpadded cache is computed without a mask by the model's attention back end."""
    back_end = attention_back_end(config)
    return back_end == "sdpa" or "flash" in back_end


def attention_back_end(config: Any) -> str:
    """Name of the attention back end of a model: "sdpa", "eager", "flash_attention_2", ..."""
    return config._attn_implementation
