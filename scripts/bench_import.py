# SPDX-License-Identifier: Apache-2.0
"""Measures how long `from vtprune import prune` takes where torch and transformers are imported already.

    python scripts/bench_import.py [--rounds 10]

Prints the median and the range of the processor seconds, each round in an interpreter of its own.
"""

from __future__ import annotations

import subprocess
import sys
from statistics import median

import typer

CODE = """
import gc, time, torch, transformers
gc.freeze()  # so that no collection goes through what those two hold
start = time.process_time()
from vtprune import prune  # what `import vtprune` alone leaves for later
print(time.process_time() - start)
"""


def main(rounds: int = typer.Option(10, min=1)) -> None:
    """Prints one line."""
    command = [sys.executable, "-c", CODE]
    subprocess.run(command, check=True, capture_output=True)  # writes the byte code
    seconds = [float(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(rounds)]
    spread = f"{min(seconds):.3f} to {max(seconds):.3f}, {rounds} rounds"
    print(f"from vtprune import prune: {median(seconds):.3f} s ({spread})")


if __name__ == "__main__":
    typer.run(main)
