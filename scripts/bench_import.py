# SPDX-License-Identifier: Apache-2.0
"""Measures how long `import vtprune` takes where torch and transformers are imported already.

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
import vtprune
print(time.process_time() - start)
"""


def main(rounds: int = typer.Option(10, min=1)) -> None:
    """Prints one line."""
    command = [sys.executable, "-c", CODE]
    subprocess.run(command, check=True, capture_output=True)  # writes the byte code
    seconds = [float(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(rounds)]
    print(f"import vtprune: {median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f}, {rounds} rounds)")


if __name__ == "__main__":
    typer.run(main)
