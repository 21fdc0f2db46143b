# SPDX-License-Identifier: Apache-2.0
"""Messages of lmms-eval's tasks in the form of chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from vtprune.errors import ConfigError


def chat_messages(request: Any, document: Any) -> list[dict[str, Any]]:
    """The messages of a request to a chat model, which asks for an answer. document: with its media."""
    return request.args[1](document)


def simple_messages(request: Any, document: Any) -> list[dict[str, Any]]:
    """The same of a request to a simple model. Media come first, then the text."""
    from lmms_eval.api.task import ConfigurableMessagesTask

    text, _, visual, *_ = request.args
    return ConfigurableMessagesTask._build_user_turn(visual(document), text)


def continuation(request: Any, document: Any) -> str:
    """The text whose likelihood a request asks for."""
    target = request.args[1]
    return target if isinstance(target, str) else target(document)


def conversation(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns that `vtprune.eval.inputs.conversation_inputs` takes. Raises ConfigError for a part it cannot take."""
    return [{"role": turn["role"], "content": [_part(part) for part in turn["content"]]} for turn in messages]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "video"):
        raise ConfigError(f"the task has parts of type {kind!r}; images, videos and text are supported")
    medium = part["url"]
    if isinstance(medium, dict) or part.get("start_time") is not None or part.get("end_time") is not None:
        raise ConfigError("the task shows parts of videos, which is not supported")
    return {"type": kind, kind: medium.convert("RGB") if isinstance(medium, Image.Image) else str(medium)}
