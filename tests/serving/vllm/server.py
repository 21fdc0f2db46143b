# SPDX-License-Identifier: Apache-2.0
"""vLLM's OpenAI server, started as the guide says, and a client of it."""

from __future__ import annotations

import base64
import io
import json
import re
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from vtprune.testing.vllm_server import Server, serving

from .checkpoints import CHECKPOINTS
from .serving import DEFAULT, STEPS, Request


class Asked(Server):
    """A server, and what tests ask it."""

    def chat(self, request: Request, **more: Any) -> dict[str, Any]:
        """The answer to a request. Raises urllib.error.HTTPError for any but 200."""
        with self.open("/v1/chat/completions", body(request) | more) as reply:
            return json.load(reply)

    def stream(self, request: Request, tokens: int = STEPS) -> Iterator[dict[str, Any]]:
        """The parts of an answer of so many tokens, as they come; the last one says how many there were."""
        more = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": tokens}
        with self.open("/v1/chat/completions", body(request) | more) as reply:
            for line in reply:
                text = line.decode().removeprefix("data: ").strip()
                if text and text != "[DONE]":
                    yield json.loads(text)

    def refusal(self, request: Request) -> tuple[int, str]:
        """The status and the message of a request that is refused."""
        try:
            self.chat(request)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]["message"]
        raise AssertionError("the request was not refused")

    def memory(self) -> int:
        """Bytes that its processes have in memory, without what they share with others."""
        return sum(process.memory_full_info().uss for process in self.processes())


def body(request: Request) -> dict[str, Any]:
    """A request as OpenAI's interface writes it, greedy."""
    parts: list[dict[str, Any]] = []
    images, videos = iter(request.images), iter(request.videos)
    names = iter(request.more.get("uuids", []))
    for piece in filter(None, re.split(r"({image}|{video})", request.text)):
        if piece == "{image}":
            image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + encoded(next(images))}}
            parts.append(image | ({"uuid": name} if (name := next(names, None)) else {}))
        elif piece == "{video}":
            frames = ",".join(encoded(Image.fromarray(frame)) for frame in next(videos))
            parts.append({"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + frames}})
        else:
            parts.append({"type": "text", "text": piece})
    asked = {"temperature": 0, "max_tokens": STEPS, "ignore_eos": True, "return_token_ids": True, "logprobs": True}
    kwargs = {} if request.method is DEFAULT else {"mm_processor_kwargs": {"vtprune": request.method}}
    return {"messages": [{"role": "user", "content": parts}]} | asked | kwargs


def encoded(image: Image.Image) -> str:
    """As PNG, which loses nothing; vLLM takes frames of a video so, too, under the name of JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def server(path: Path, *options: str, log: Path) -> Iterator[Asked]:
    """A server of a checkpoint that listens on the loopback address. log: where it writes what it says."""
    template, checkpoint = log.with_suffix(".jinja"), CHECKPOINTS[path.name]
    template.write_text(  # the text as it comes, as a session is given it
        "{% for message in messages %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
        f"{{% elif part.type == 'image' %}}{checkpoint.image}{{% else %}}{checkpoint.video}{{% endif %}}"
        "{% endfor %}{% endfor %}"
    )
    own = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--block-size", "32", "--seed", "0"]
    own += ["--max-num-seqs", "8", "--media-io-kwargs", '{"video": {"fps": 2.0}}']  # as `clip` makes them
    own += ["--chat-template", str(template), "--chat-template-content-format", "openai"]
    with serving(path, [*own, *options], log) as found:
        yield Asked(found.address, found.process)
