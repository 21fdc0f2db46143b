# SPDX-License-Identifier: Apache-2.0
"""The private side of transformers, and what differs between its releases. All else of this library asks here.

What transformers documents (models, configs, `generate()`, `DynamicCache`) is used where it is needed. What it does not
promise is here:

* `release`: which release is installed, and whether the tests know it.
* `arguments`: names of the arguments of decoders.
* `layers`: kinds of decoder layers, and the layers of their caches.
* `masks`: mask factories and attention back ends.
* `positions`: rotary embeddings.
* `capture`: copies of attention modules that hand out what their attention function is called with.
* `decoder_attention`, `encoder_attention`: scores of one layer, by the layer's own code.
* `classes`: which classes there are, and where the class of a model comes from.
* `models`: single functions of single models, and what loading needs.

Names that take seconds to import, because they pull in the compiler, are imported where they are used: any loaded
model has done it already.
"""

from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    LinearAttentionCacheLayerMixin,
    StaticCache,
)

from vtprune.transformers_private.arguments import (
    CACHE,
    ask_for_all_rows,
    by_name,
    cache_of,
    check_arguments,
    check_nothing_told,
    cut_along,
    deepstack_of,
    drop_deepstack,
    last_rows_only,
    told_by_token,
    with_cache,
    with_first_features,
)
from vtprune.transformers_private.capture import EncoderScores, Scored
from vtprune.transformers_private.classes import is_language_model, is_remote_code, multimodal_classes
from vtprune.transformers_private.decoder_attention import (
    attention_input,
    cached_keys,
    eager_weights,
    output_width,
    project_keys,
    project_queries,
    projections,
    reads_positions,
    scored,
)
from vtprune.transformers_private.encoder_attention import (
    eager_encoder_attention,
    encoder_scores,
    is_rotated,
    query_key_projections,
)
from vtprune.transformers_private.layers import (
    attention_window,
    carried,
    check_decoder,
    check_replay,
    column_counters,
    create_missing_layers,
    fixed_address,
    has_keys,
    is_checkpointed,
    is_paged,
    is_plain_layer,
    is_prunable,
    keeps_prompt,
    key_sources,
    layer_config,
    layer_kinds,
    layer_type,
    longest_prunable,
    state_kinds,
    static_columns,
)
from vtprune.transformers_private.masks import (
    attention_back_end,
    encoder_mask,
    layer_mask,
    step_mask,
    unmasked_steps,
)
from vtprune.transformers_private.models import (
    chosen_feature_layers,
    commit_of,
    gemma3_blocks,
    gemma3n_attention_input,
    gemma3n_output,
    llava_next_crops,
    muse_window_order,
    qwen2_5_vl_window_order,
    uninitialised,
)
from vtprune.transformers_private.positions import (
    rotary_embedding,
    rotates_by_position_alone,
    rotation_kind,
    uses_mrope,
)
from vtprune.transformers_private.release import VERSION, check_release, is_own, is_tested_release, releases

__all__ = [
    "CACHE",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "EncoderScores",
    "LinearAttentionCacheLayerMixin",
    "Scored",
    "StaticCache",
    "VERSION",
    "ask_for_all_rows",
    "attention_back_end",
    "attention_input",
    "attention_window",
    "by_name",
    "cache_of",
    "cached_keys",
    "carried",
    "check_arguments",
    "check_decoder",
    "check_nothing_told",
    "check_release",
    "check_replay",
    "column_counters",
    "chosen_feature_layers",
    "commit_of",
    "create_missing_layers",
    "cut_along",
    "deepstack_of",
    "drop_deepstack",
    "eager_encoder_attention",
    "eager_weights",
    "encoder_mask",
    "encoder_scores",
    "fixed_address",
    "gemma3_blocks",
    "gemma3n_attention_input",
    "gemma3n_output",
    "has_keys",
    "is_checkpointed",
    "is_language_model",
    "is_own",
    "is_paged",
    "is_rotated",
    "is_plain_layer",
    "is_prunable",
    "is_remote_code",
    "is_tested_release",
    "keeps_prompt",
    "key_sources",
    "last_rows_only",
    "layer_config",
    "layer_mask",
    "layer_kinds",
    "layer_type",
    "llava_next_crops",
    "longest_prunable",
    "muse_window_order",
    "multimodal_classes",
    "output_width",
    "project_keys",
    "project_queries",
    "projections",
    "query_key_projections",
    "qwen2_5_vl_window_order",
    "reads_positions",
    "releases",
    "rotary_embedding",
    "rotates_by_position_alone",
    "rotation_kind",
    "scored",
    "state_kinds",
    "told_by_token",
    "static_columns",
    "step_mask",
    "uninitialised",
    "unmasked_steps",
    "uses_mrope",
    "with_cache",
    "with_first_features",
]
