# SPDX-License-Identifier: Apache-2.0
"""Models and their inputs: load a model, lay out prompts, read videos, make images smaller."""

from vtprune.eval.inputs.models import answers, check_device, empty_model, load_model, resolve_model
from vtprune.eval.inputs.prompts import InputCache, chat_inputs, conversation_inputs, processed_view
from vtprune.eval.inputs.videos import read_frames

__all__ = [
    "InputCache",
    "answers",
    "chat_inputs",
    "conversation_inputs",
    "check_device",
    "empty_model",
    "load_model",
    "processed_view",
    "read_frames",
    "resolve_model",
]
