# SPDX-License-Identifier: Apache-2.0
"""The page of the built-in model, served while a test module runs."""

import socket
from contextlib import contextmanager

from vtprune.demo.comparison import Source
from vtprune.demo.serve import serve


@contextmanager
def served(model="digitscenes"):
    """The address of the page."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    page = serve(Source(model), "127.0.0.1", port, 16)
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        page.close(verbose=False)
