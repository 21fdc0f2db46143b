# SPDX-License-Identifier: Apache-2.0
"""What a server can be started with that runs its vision encoder past the plug-in: refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vtprune.errors import UnsupportedModelError, UnsupportedStageError
from vtprune.serving.setting import KEY, ServerSetting

_FOUND = "vtprune_excluded_by"
"""Name in the model's config, which the processor of requests sees, too."""


def checking(original: Any, look: Callable[[Any], None]) -> type:
    """A class for vLLM's `MODELS_CONFIG_MAP`, by which it lets an architecture look at the whole configuration.

    original: the one that stood there, or None. look: is given the configuration, too.
    """

    class Checks(original or object):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            if original is not None:
                original.verify_and_update_config(vllm_config)
            look(vllm_config)

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            if original is not None:
                original.verify_and_update_model_config(model_config)

    return Checks


def refuse(vllm_config: Any) -> None:
    """Raise UnsupportedModelError if a server of an architecture that cannot be pruned is asked to prune."""
    config = vllm_config.model_config.hf_config
    if getattr(config, KEY, None) is not None:
        raise UnsupportedModelError(f"vtprune prunes no {' '.join(config.architectures or ['such model'])} in vLLM")


def note(vllm_config: Any) -> None:
    """Raise UnsupportedStageError if the server prunes by default and cannot; else remember it for its requests."""
    found = excluding(vllm_config)
    config = vllm_config.model_config.hf_config
    if found:
        setattr(config, _FOUND, found)
        if ServerSetting.of(getattr(config, KEY, None)).default is not None:
            check(config)


def check(config: Any) -> None:
    """Raise UnsupportedStageError if a server of this config can prune nothing."""
    if found := getattr(config, _FOUND, None):
        raise UnsupportedStageError(f"visual tokens cannot be pruned in a server that is started with {found}")


def excluding(vllm_config: Any) -> str:
    """The options that exclude pruning, with the reason; empty if there are none."""
    lora, compilation = vllm_config.lora_config, vllm_config.compilation_config
    multimodal, parallel = vllm_config.model_config.multimodal_config, vllm_config.parallel_config
    reasons = {
        "enable_tower_connector_lora: adapters of the vision encoder count the tokens that are left": (
            lora is not None and lora.enable_tower_connector_lora
        ),
        "compile_mm_encoder: a compiled vision encoder shows nothing of what methods read": (
            compilation.compile_mm_encoder
        ),
        "cudagraph_mm_encoder: captured graphs of the vision encoder run past the place where tokens are dropped": (
            compilation.cudagraph_mm_encoder
        ),
        "mm_encoder_tp_mode='data': each rank encodes other images than those it chooses tokens of": (
            multimodal is not None and multimodal.mm_encoder_tp_mode == "data" and parallel.tensor_parallel_size > 1
        ),
        "video_pruning_rate: vLLM drops tokens of videos by a method of its own": (
            multimodal is not None and multimodal.is_multimodal_pruning_enabled()
        ),
    }
    return "; ".join(reason for reason, present in reasons.items() if present)
