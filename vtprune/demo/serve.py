# SPDX-License-Identifier: Apache-2.0
"""Opens the page on a port of this machine."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from vtprune.demo.comparison import Comparison, Source
from vtprune.demo.uploads import LIMITS
from vtprune.errors import ConfigError

_WAITING = 16
"""Questions that wait for the model; further ones are turned away."""


def check_gradio() -> None:
    """Raise ConfigError where Gradio is missing."""
    if find_spec("gradio") is None:
        raise ConfigError('the demo needs Gradio: pip install "vtprune[demo]"')


def serve(source: Source, host: str, port: int | None, max_new_tokens: int) -> Any:
    """Loads a model and serves its page, in a thread of its own.

    Args:
        source: what to load.
        host: address to listen on.
        port: to listen on; None: the first free one from 7860 on.
        max_new_tokens: longest answer.

    Returns:
        Gradio's page, which runs: `local_url` is its address, `block_thread()` waits until the process is interrupted.

    Raises:
        ConfigError: Gradio is missing, the model cannot be loaded, or the port is taken.
        UnsupportedModelError: the model cannot be pruned.
    """
    check_gradio()
    comparison = Comparison.open(source, max_new_tokens)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # or Gradio tells its makers that it runs
    from vtprune.demo.page import LOOK, build_page

    page = build_page(comparison).queue(max_size=_WAITING)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            max_file_size=LIMITS.bytes,
            footer_links=[],
            ssr_mode=False,
            enable_monitoring=False,
            state_session_capacity=32,
            prevent_thread_lock=True,
            quiet=True,  # it would name an option that opens the page to the world
            **LOOK,
        )
    except OSError as error:
        raise ConfigError(f"{host}: cannot listen: {error}") from error
    return page
