# SPDX-License-Identifier: Apache-2.0
"""The command `vtprune demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from vtprune.errors import ConfigError


def demo(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model, or 'digitscenes_video'.")] = "digitscenes",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default the first free one from 7860 on.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: all accelerators, else cpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: that of the weights.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
) -> None:
    """Open a page that shows what methods keep of a picture or clip, and what the model answers (docs/demo.md)."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype}: expected auto, float32, bfloat16 or float16")
    from vtprune.demo.comparison import Source
    from vtprune.demo.serve import serve

    page = serve(Source(model, device, dtype), host, port, max_new_tokens)
    typer.echo(f"{page.local_url} shows the demo of {model}; Ctrl-C ends it")
    page.block_thread()
