# SPDX-License-Identifier: Apache-2.0
"""A task of own data: a file with a row for each question, and a folder with the pictures or videos."""

from __future__ import annotations

from pathlib import Path

from vtprune.config import ConfigModel
from vtprune.errors import ConfigError
from vtprune.eval.tasks.base import Task


class FileTask(ConfigModel):
    """Where own data are, and how answers are scored."""

    file: Path
    """JSONL or CSV, one question a row"""
    name: str | None = None
    """in tables and results; default the file's name without its ending"""

    @property
    def title(self) -> str:
        return self.name or self.file.stem

    def open(self) -> Task:
        """Reads and checks the rows.

        Raises:
            ConfigError: names the file, the line and what is wrong.
        """
        raise ConfigError(f"{self.file}: tasks of files cannot be read yet")
