# SPDX-License-Identifier: Apache-2.0
"""Reads own data, JSONL or CSV. Everything that is wrong is said at once, with the file and the line."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtprune.errors import ConfigError
from vtprune.eval.tasks.base import Kind
from vtprune.eval.tasks.scores import levenshtein

_MEDIA: dict[str, Kind] = {"image": "image", "images": "image", "video": "video"}
_LISTS = ("images", "choices", "answers")
COLUMNS = (*_MEDIA, "question", "choices", "answer", "answers", "family")
_NEAR = 2
"""A column whose name is so many letters or fewer from a known one is taken for a slip of the pen."""
_TOLD = 5
"""So many problems of a file are told; of the others their number."""


@dataclass
class Problems:
    """What is wrong with the rows of a file."""

    path: Path
    found: dict[int, list[str]] = field(default_factory=dict)
    """line, from 1 -> problems"""

    def add(self, line: int, problem: str) -> None:
        self.found.setdefault(line, []).append(problem)

    def check(self) -> None:
        """Raises ConfigError with the first problems if there are any."""
        told = [f"{self.path}, line {line}: {text}" for line, texts in sorted(self.found.items()) for text in texts]
        if len(told) > _TOLD:
            told[_TOLD:] = [f"{self.path}: and {len(told) - _TOLD} more problems"]
        if told:
            raise ConfigError("\n".join(told))


@dataclass(frozen=True)
class Row:
    """One question, as the file has it."""

    line: int
    """from 1"""
    kind: Kind
    media: tuple[str, ...]
    """paths as written"""
    question: str
    choices: tuple[str, ...]
    answers: tuple[str, ...]
    family: str | None


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, at least one. Media are not looked at.

    Raises:
        ConfigError: the file cannot be read; or names the lines and what is wrong with them.
    """
    problems = Problems(path)
    reader = {".jsonl": _json_rows, ".csv": _csv_rows}.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"{path}: expected a file that ends in .jsonl or .csv")
    raw = list(reader(_text(path), problems))
    _check_columns(raw, problems)
    rows = [row for line, cells in raw if (row := _row(line, cells, problems)) is not None]
    _check_together(rows, problems)
    problems.check()
    if not rows:
        raise ConfigError(f"{path}: there is no row")
    return rows


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")  # spreadsheets put a mark at the beginning
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from error


def _json_rows(text: str, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} is given twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            # Numbers stay as they are written: 0.50 is an answer of its own.
            row = json.loads(content, object_pairs_hook=once, parse_float=str, parse_int=str, parse_constant=refuse)
        except ValueError as error:
            problems.add(line, f"not valid JSON: {error}")
            continue
        if isinstance(row, dict):
            yield line, {key: value for key, value in row.items() if value is not None}
        else:
            problems.add(line, 'expected an object, {"image": ..., "question": ..., "answer": ...}')


def _csv_rows(text: str, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        for name, count in Counter(header).items():
            if count > 1:
                problems.add(1, f"column {name!r} is there twice")
        if not set(header) & set(COLUMNS):
            problems.add(1, f"expected columns {', '.join(COLUMNS)}, separated by commas, got {', '.join(header)}")
            return
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                problems.add(line, f"{len(cells)} cells, but {len(header)} columns")
            elif cells:
                yield line, {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()}
            line = reader.line_num + 1
    except csv.Error as error:
        problems.add(line, f"not valid CSV: {error}")


def _check_columns(raw: list[tuple[int, dict[str, Any]]], problems: Problems) -> None:
    """An unknown column is ignored, unless it looks like a known one with a slip of the pen."""
    told: set[str] = set()
    for line, cells in raw:
        for name in cells.keys() - set(COLUMNS) - told:
            told.add(name)
            meant = [known for known in COLUMNS if levenshtein(name.strip().casefold(), known) <= _NEAR]
            if meant:
                problems.add(line, f"column {name!r}: did you mean {' or '.join(meant)}?")


def _row(line: int, cells: dict[str, Any], problems: Problems) -> Row | None:
    """The row, or None if something is wrong with it."""
    texts: dict[str, tuple[str, ...]] = {}
    before = len(problems.found.get(line, ()))
    for name in COLUMNS:
        if name in cells:
            try:
                texts[name] = _texts(name, cells[name])
            except ValueError as error:
                problems.add(line, f"{name}: {error}")
    shown = [name for name in _MEDIA if name in cells]
    if len(shown) != 1:
        got = " and ".join(shown) or "none"
        problems.add(line, f"expected one of image, images and video, got {got}")
    if "question" not in cells:
        problems.add(line, "no question")
    answered = [name for name in ("answer", "answers") if name in cells]
    if len(answered) != 1:
        problems.add(line, "answer and answers are both given" if answered else "no answer")
    if len(problems.found.get(line, ())) > before:
        return None
    return Row(
        line,
        _MEDIA[shown[0]],
        texts[shown[0]],
        texts["question"][0],
        texts.get("choices", ()),
        texts[answered[0]],
        texts["family"][0] if "family" in texts else None,
    )


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """The texts of a cell, one if the column is no list. Raises ValueError if it holds something else."""
    many = name in _LISTS
    if many and isinstance(value, str) and value.lstrip().startswith("["):  # in CSV
        try:
            value = json.loads(value, parse_float=str, parse_int=str)
        except ValueError as error:
            raise ValueError(f"not a valid JSON list: {error}") from error
    values = value if many and isinstance(value, list) else [value]
    for item in values:
        if not isinstance(item, str):
            hint = "; several accepted answers go into answers" if name == "answer" and isinstance(item, list) else ""
            raise ValueError(f"expected {'texts or numbers' if many else 'a text or a number'}, got {item!r}{hint}")
        if not item.strip():
            raise ValueError("empty")
    if not values:
        raise ValueError("an empty list")
    return tuple(values)


def _check_together(rows: list[Row], problems: Problems) -> None:
    """Rows that do not go with one before."""
    first: dict[tuple, int] = {}
    for row in rows:
        if row.kind != rows[0].kind:
            problems.add(
                row.line,
                f"a row with {row.kind}s, but line {rows[0].line} has {rows[0].kind}s; make a file of each kind",
            )
        asked = (row.media, row.question, row.choices)
        if asked in first:
            problems.add(row.line, f"asks the same as line {first[asked]}")
        first.setdefault(asked, row.line)
