# SPDX-License-Identifier: Apache-2.0
"""Which classes of models the installed release has, and where the class of a model comes from."""

from __future__ import annotations

from typing import Any

import transformers
from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME


def multimodal_classes() -> dict[str, str]:
    """Model type -> class, of what transformers loads as a language model with images, videos or sound, or as a model
    that retrieves documents by their images."""
    from transformers.models.auto import modeling_auto as auto

    # Not all classes for retrieval are in a mapping.
    retrieval = [name for name in dir(transformers) if name.endswith("ForRetrieval")]
    return {
        **{getattr(transformers, name).config_class.model_type: name for name in retrieval},
        **auto.MODEL_FOR_RETRIEVAL_MAPPING_NAMES,
        **auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        **auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }


def is_language_model(model_type: str) -> bool:
    """Whether transformers loads models of a type as causal language models."""
    from transformers.models.auto import modeling_auto as auto

    return model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def is_remote_code(model: Any) -> bool:
    """Whether a model's class was loaded from the checkpoint's repository (`trust_remote_code=True`)."""
    return type(model).__module__.partition(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME
