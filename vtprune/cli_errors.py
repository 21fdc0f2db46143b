# SPDX-License-Identifier: Apache-2.0
"""How commands end that cannot do what they are asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import typer

from vtprune.errors import VTPruneError

ONLY_FOR_EVALUATION = ("av", "datasets", "lmms_eval", "loguru", "matplotlib", "sklearn")
"""Modules that come with the extra `eval` alone."""


def plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """What the library refuses, and an extra that is missing, end in a message and exit code 2; anything else is a bug
    and keeps its traceback."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except VTPruneError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error
        except ModuleNotFoundError as error:
            module = (error.name or "").partition(".")[0]
            if module not in ONLY_FOR_EVALUATION:
                raise
            typer.echo(f'error: evaluation needs {module}: pip install "vtprune[eval]"', err=True)
            raise typer.Exit(2) from error

    return guarded
