# SPDX-License-Identifier: Apache-2.0
"""What a person sets on the page, and the same as the query of a link."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from urllib.parse import parse_qs, urlencode

from vtprune.config import nearest
from vtprune.errors import ConfigError
from vtprune.eval.digitscenes import SIZE, VIDEO_SIZE
from vtprune.methods import AUTO, list_methods

MOST_METHODS = 3
"""Methods side by side."""
LONGEST_QUESTION = 2000
"""Characters."""
_MOST_TOKENS = 1 << 16
"""A link names no token from this one on."""


@dataclass(frozen=True)
class Setting:
    """What is asked of a picture or clip, and which methods answer.

    Raises ConfigError if anything of it is out of its range.
    """

    question: str
    """1 to `LONGEST_QUESTION` characters"""
    methods: tuple[str, ...]
    """names, "auto" among them; at most `MOST_METHODS`"""
    keep_ratio: float
    """of every method, in (0, 1]"""
    chosen: tuple[int, ...] | None = None
    """ascending visual tokens, counted from 0, that a person keeps; None: nobody chose"""
    example: int | None = None
    """number of a DigitScenes example; None: the picture or clip was uploaded"""

    def __post_init__(self) -> None:
        if not 0 < len(self.question.strip()) <= LONGEST_QUESTION:
            raise ConfigError(f"ask a question of 1 to {LONGEST_QUESTION} characters")
        if len(self.methods) > MOST_METHODS:
            raise ConfigError(f"choose at most {MOST_METHODS} methods, not {len(self.methods)}")
        known = {AUTO, *list_methods()}
        for name in self.methods:
            if name not in known:
                raise ConfigError(f"unknown method {name!r}: {nearest(name, known)}")
        if len(set(self.methods)) < len(self.methods):
            raise ConfigError("a method is given twice")
        if not 0 < self.keep_ratio <= 1:
            raise ConfigError(f"keep_ratio {self.keep_ratio}: expected more than 0, and at most 1")
        if self.example is not None and not 0 <= self.example < min(SIZE, VIDEO_SIZE):
            raise ConfigError(f"example {self.example}: expected 0 to {min(SIZE, VIDEO_SIZE) - 1}")

    def query(self) -> str:
        """The part of a link behind the question mark. An upload is not in it."""
        pairs: list[tuple[str, object]] = [("question", self.question)]
        pairs += [("method", name) for name in self.methods]
        pairs.append(("keep_ratio", self.keep_ratio))
        if self.example is not None:
            pairs.append(("example", self.example))
        if self.chosen is not None:
            pairs.append(("tokens", _ranges(self.chosen)))
        return urlencode(pairs)

    @classmethod
    def of_query(cls, query: str) -> Setting:
        """The setting of a link. Raises ConfigError if a part is missing, unknown, given twice or out of its range."""
        given = parse_qs(query, keep_blank_values=True)
        given = {key: values for key, values in given.items() if not key.startswith("__")}  # "__theme" is Gradio's
        for key in given.keys() - {"question", "method", "keep_ratio", "example", "tokens"}:
            raise ConfigError(f"the link has an unknown part {key!r}")
        tokens = _single(given, "tokens")
        example = _single(given, "example")
        return cls(
            question=_single(given, "question") or "",
            methods=tuple(given.get("method", ())),
            keep_ratio=_ratio(_single(given, "keep_ratio") or ""),
            chosen=None if tokens is None else _tokens(tokens),
            example=None if example is None else _count("example", example),
        )


def _single(given: Mapping[str, list[str]], key: str) -> str | None:
    values = given.get(key, [])
    if len(values) > 1:
        raise ConfigError(f"the link has {key!r} twice")
    return values[0] if values else None


def _ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"the link has no number as 'keep_ratio': {text!r}") from None


def _count(key: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ConfigError(f"the link has no whole number as {key!r}: {text!r}")
    return int(text)


def _ranges(tokens: Iterable[int]) -> str:
    """Ascending numbers as "0-5.9": ranges are shorter, and a full stop needs no escape in a link."""
    numbers = list(tokens)
    starts = [0, *(index for index, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1), len(numbers)]
    runs = [(numbers[start], numbers[end - 1]) for start, end in pairwise(starts) if start < end]
    return ".".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _tokens(text: str) -> tuple[int, ...]:
    """The numbers of `_ranges`."""
    found: set[int] = set()
    for part in text.split(".") if text else ():
        first, _, last = part.partition("-")
        start, end = _count("tokens", first), _count("tokens", last or first)
        if not 0 <= start <= end < _MOST_TOKENS:
            raise ConfigError(f"the link has no tokens {part!r}: expected ascending numbers below {_MOST_TOKENS}")
        found.update(range(start, end + 1))
    return tuple(sorted(found))
