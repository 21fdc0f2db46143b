# SPDX-License-Identifier: Apache-2.0
"""vLLM's OpenAI server, started as the guide says, and a client of it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from .checkpoints import CHECKPOINTS
from .serving import DEFAULT, STEPS, Request


@dataclass(frozen=True)
class Server:
    address: str
    process: psutil.Process

    def chat(self, request: Request, **more: Any) -> dict[str, Any]:
        """The answer to a request. Raises urllib.error.HTTPError for any but 200."""
        with self._open("/v1/chat/completions", body(request) | more) as reply:
            return json.load(reply)

    def stream(self, request: Request, tokens: int = STEPS) -> Iterator[dict[str, Any]]:
        """The parts of an answer of so many tokens, as they come; the last one says how many there were."""
        more = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": tokens}
        with self._open("/v1/chat/completions", body(request) | more) as reply:
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

    def metrics(self) -> dict[str, float]:
        """Name with labels -> value."""
        with self._open("/metrics") as reply:
            lines = [line for line in reply.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def metric(self, name: str) -> float:
        return sum(value for key, value in self.metrics().items() if key.split("{")[0] == name)

    def blocks(self) -> int:
        """How many blocks the KV cache has."""
        (info,) = (key for key in self.metrics() if key.startswith("vllm:cache_config_info"))
        found = re.search(r'num_gpu_blocks="(\d+)"', info)
        assert found
        return int(found[1])

    def memory(self) -> int:
        """Bytes that its processes have in memory, without what they share with others."""
        processes = [self.process, *self.process.children(recursive=True)]
        return sum(process.memory_full_info().uss for process in processes)

    def _open(self, path: str, data: Mapping[str, Any] | None = None) -> Any:
        content = None if data is None else json.dumps(data).encode()
        asked = urllib.request.Request(self.address + path, content, {"Content-Type": "application/json"})
        return urllib.request.urlopen(asked, timeout=300)


def body(request: Request) -> dict[str, Any]:
    """A request as OpenAI's interface writes it, greedy."""
    parts: list[dict[str, Any]] = []
    images = iter(request.images)
    names = iter(request.more.get("uuids", []))
    for index, text in enumerate(request.text.split("{image}")):
        if index:
            image = {"type": "image_url", "image_url": {"url": data_url(next(images))}}
            parts.append(image | ({"uuid": name} if (name := next(names, None)) else {}))
        if text:
            parts.append({"type": "text", "text": text})
    asked = {"temperature": 0, "max_tokens": STEPS, "ignore_eos": True, "return_token_ids": True, "logprobs": True}
    kwargs = {} if request.method is DEFAULT else {"mm_processor_kwargs": {"vtprune": request.method}}
    return {"messages": [{"role": "user", "content": parts}]} | asked | kwargs


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def server(path: Path, *options: str, log: Path) -> Iterator[Server]:
    """A server of a checkpoint that listens on the loopback address. log: where it writes what it says."""
    template = log.with_suffix(".jinja")  # the text as it comes, as a session is given it
    template.write_text(
        "{% for message in messages %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
        f"{{% else %}}{CHECKPOINTS[path.name].image}{{% endif %}}{{% endfor %}}{{% endfor %}}"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", "--block-size", "32", "--max-num-seqs", "8", "--seed", "0"]
    command += ["--chat-template", str(template), "--chat-template-content-format", "openai"]
    with log.open("w") as output:
        process = subprocess.Popen([*command, *options], stdout=output, stderr=output, env=os.environ)
        found = Server(f"http://127.0.0.1:{port}", psutil.Process(process.pid))
        try:
            _wait(found, process, log)
            yield found
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(found: Server, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}: {log.read_text()[-4000:]}")
        try:
            found._open("/health").close()
            return
        except urllib.error.URLError:
            time.sleep(0.5)
    raise TimeoutError(log.read_text()[-4000:])
