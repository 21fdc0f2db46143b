# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Qwen4-Exp."""

from __future__ import annotations

from collections.abc import Callable

import transformers as hf

from vtprune.testing.configs import EXPERTS, TEXT
from vtprune.testing.media import VOCABULARY
from vtprune.testing.tiny.family import Family
from vtprune.testing.tiny.qwen_vl import IDS, LINEAR, STAMPED, VISION_3, mm_token_types

_FIELDS = (
    TEXT
    | LINEAR
    | EXPERTS
    | dict(
        layer_types=["linear_attention", "linear_attention", "linear_attention", "indexed_attention"] * 2,
        shared_expert_intermediate_size=16,
        hc_count=2,
        hc_lowrank=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_compress_ratio=3,
        indexer_budget=12,
        eos_token_id=VOCABULARY - 1,
    )
)
"""Blocks of three columns, of which a query sees four at most, and the tokens behind the last block."""
_RUNS = dict(
    ple_layer_ids=[1, 3],
    ple_embed_dim=16,
    ple_conv_kernel_size=2,
    heads_per_ngram=2,
    ngram_vocab_size_base=64,
    split_ngram_parts=1,
    make_ngram_vocab_size_divisible_by=8,
)


def _qwen4(**fields) -> Callable:
    return lambda **text: hf.Qwen4ExpConfig(vision_config=VISION_3, text_config=_FIELDS | fields | text, **IDS)


FAMILIES = {
    "qwen4_exp": Family(  # layers 0 and 2 add embeddings of runs of three tokens
        "Qwen4ExpForConditionalGeneration", _qwen4(**_RUNS), STAMPED, mm_token_types, carries_state=True, kindred=True
    ),
}
