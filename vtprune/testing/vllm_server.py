# SPDX-License-Identifier: Apache-2.0
"""vLLM's OpenAI server in a process of its own, where vLLM is installed: for its tests and benchmarks."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # comes with vLLM

_LIMIT = 300.0
"""Seconds that a server may take to start, and a request to be answered."""


@dataclass(frozen=True)
class Server:
    address: str
    process: psutil.Process

    def open(self, path: str, data: Mapping[str, Any] | None = None) -> Any:
        """The reply to a request; `data` is posted as JSON. Raises urllib.error.HTTPError for any but 200."""
        content = None if data is None else json.dumps(data).encode()
        asked = urllib.request.Request(self.address + path, content, {"Content-Type": "application/json"})
        return urllib.request.urlopen(asked, timeout=_LIMIT)

    def metrics(self) -> dict[str, float]:
        """Name with labels -> value."""
        with self.open("/metrics") as reply:
            lines = [line for line in reply.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def metric(self, name: str) -> float:
        """The sum over labels."""
        return sum(value for key, value in self.metrics().items() if key.split("{")[0] == name)

    def cache(self) -> tuple[int, int]:
        """How many blocks the KV cache has for requests, and how many tokens a block holds."""
        (info,) = (key for key in self.metrics() if key.startswith("vllm:cache_config_info"))
        values = dict(re.findall(r'(\w+)="([^"]*)"', info))
        return int(values["num_gpu_blocks"]) - 1, int(values["block_size"])  # one block is vLLM's own

    def processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]


@contextmanager
def serving(path: str | Path, options: Sequence[str], log: Path) -> Iterator[Server]:
    """A server of a checkpoint that listens on the loopback address.

    options: of its command line. log: where it writes what it says.
    Raises RuntimeError if it ends before it answers, and TimeoutError.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The distribution for CPUs has no command `vllm`.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path)]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ)
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
    until = time.monotonic() + _LIMIT
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}: {log.read_text()[-4000:]}")
        try:
            found.open("/health").close()
            return
        except urllib.error.URLError:
            time.sleep(0.5)
    raise TimeoutError(log.read_text()[-4000:])
