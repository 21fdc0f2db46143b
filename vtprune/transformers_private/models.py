# SPDX-License-Identifier: Apache-2.0
"""Single functions of single models, and what loading needs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor


def chosen_feature_layers(config: Any) -> list[int]:
    """Entries of the encoder's hidden states that a projector reads, as a model's config says it; -1, the last one, if
    it does not."""
    # VipLLaVA has its own name up to transformers 5.18, and this one since.
    chosen = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", -1))
    return [chosen] if isinstance(chosen, int) else list(chosen)


def gemma3_blocks(token_types: Tensor) -> Tensor:
    """(batch, n) token types of Gemma 3 -> (batch, n) long: the image of each token, -1 for none."""
    from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

    return get_block_sequence_ids_for_mask(token_types)


def gemma3n_attention_input(layer: Any, hidden: Tensor) -> Tensor:
    """(batch, n, dim): what a decoder layer of Gemma 3n hands its attention module for streams (streams, batch, n, dim)
    of hidden states: the active one, as the layer predicts it."""
    return layer.input_layernorm(layer.altup.predict(hidden)[layer.config.altup_active_idx])


def gemma3n_output(decoder: Any, hidden: Tensor) -> Tensor:
    """(batch, n, dim): what Gemma 3n makes of its streams (streams, batch, n, dim) before its last normalisation: their
    mean, all but the first one projected, and made as large as the first one."""
    first, *others = hidden.unbind(0)
    size, total = first.square().mean(-1, keepdim=True).sqrt(), first
    for projection, stream in zip(decoder.altup_unembed_projections, others, strict=True):
        projected = projection(stream)
        total = total + projected * size / projected.square().mean(-1, keepdim=True).clamp(min=1e-5).sqrt()
    return total / len(hidden)


def llava_next_crops(size: Sequence[int], pinpoints: Any, tile: int) -> int:
    """How many crops LLaVA-NeXT makes of an image of a (height, width), the overview included."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return image_size_to_num_patches(size, pinpoints, tile)


def qwen2_5_vl_window_order(grids: Tensor, vision_config: Any) -> Tensor:
    """(merged tokens,) long: the order in which Qwen2.5-VL's encoder sorts the merged tokens of (media, 3) grids."""
    from transformers.vision_utils import get_vision_window_index

    order, _ = get_vision_window_index(
        grids, vision_config.spatial_merge_size, vision_config.window_size, vision_config.patch_size
    )
    return order


def muse_window_order(grids: Tensor, vision_config: Any) -> Tensor:
    """(patches,) long: the order in which the encoder of Muse sorts the patches of (media, 3) grids."""
    from transformers.vision_utils import get_vision_window_index

    window = vision_config.pos_emb_height * vision_config.patch_size
    order, _ = get_vision_window_index(grids, 1, window, vision_config.patch_size)
    return order


def uninitialised() -> AbstractContextManager:
    """While it lasts, models are made without filling their weights."""
    from transformers.initialization import no_init_weights

    return no_init_weights()


def commit_of(config: Any) -> str | None:
    """The commit of the hub's snapshot that a config was read from; None for a folder."""
    return config._commit_hash
