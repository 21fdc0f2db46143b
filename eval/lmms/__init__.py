# SPDX-License-Identifier: Apache-2.0
"""vtprune as a model of lmms-eval: `python -m lmms_eval --model vtprune --model_args pretrained=...,method=mmtok,...`.

lmms-eval finds `manifest` through the entry point group `lmms_eval.models` and imports the classes when it needs them.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Where lmms-eval finds the model `vtprune`; with `--force_simple` the class for tasks of log-likelihoods."""
    from lmms_eval.models.registry_v2 import ModelManifest

    model = f"{__name__}.model"
    return ModelManifest("vtprune", f"{model}.VTPruneSimple", f"{model}.VTPruneChat")
