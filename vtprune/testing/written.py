# SPDX-License-Identifier: Apache-2.0
"""Images that a model writes into its prompt itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor


def written(model, inputs: dict[str, Tensor], placeholder: int) -> tuple[dict[str, Tensor], Any]:
    """Arguments and output of an encode call, of a model that writes images into its prompt itself."""
    arguments, ids = {name: value for name, value in inputs.items() if name.startswith("image_")}, inputs["input_ids"]
    rows = model.base_model.embed_tokens_extend(ids, model.get_input_embeddings()(ids), **arguments)[ids == placeholder]
    return arguments, SimpleNamespace(pooler_output=[rows])
