# SPDX-License-Identifier: Apache-2.0
"""A task of own data: a file with a row for each question, and a folder with the pictures or videos."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from string import Formatter, ascii_uppercase
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from vtprune.config import ConfigModel, key_error
from vtprune.errors import ConfigError
from vtprune.eval.tasks import media_files
from vtprune.eval.tasks.base import Conversation, Kind, Task, user_turn
from vtprune.eval.tasks.rows import Problems, Row, read_rows
from vtprune.eval.tasks.scores import SCORES, ScoreName, last_number, lettered, number, picked, plain

_PLACES = ("question", "choices")
_PICK = "{question}\n{choices}\nAnswer with the letter of the right choice."


@dataclass(frozen=True)
class FileExample:
    """A row of a file."""

    question: str
    """the whole text of the prompt"""
    answers: tuple[str, ...]
    """accepted answers; of choices their texts"""
    choices: tuple[str, ...]
    family: str
    media: tuple[Path, ...]
    kind: Kind

    @property
    def answer(self) -> str:
        """The first accepted answer; a choice has its letter, too."""
        first = self.answers[0]
        return lettered(self.choices)[self.choices.index(first)] if first in self.choices else first

    def conversation(self) -> Conversation:
        from vtprune.show import load_picture

        media = list(map(load_picture, self.media)) if self.kind == "image" else list(self.media)
        return [user_turn(media, self.question, self.kind)]

    def digest(self) -> str:
        """16 hex digits that change with the texts of the row and the content of its media, not with their names."""
        texts = [self.question, self.answers, self.choices, self.family]
        content = [media_files.digest_of(path, self.kind) for path in self.media]
        return hashlib.sha256(json.dumps([texts, content]).encode()).hexdigest()[:16]


class FileTask(ConfigModel):
    """Where own data are, and how answers are scored.

    Paths in an evaluation file are relative to its folder. Paths given on the command line or in Python are relative to
    the working folder.
    """

    file: Path
    """JSONL or CSV, one question a row"""
    media: Path | None = None
    """folder that the paths in the rows are relative to; default the folder of `file`"""
    score: ScoreName | None = None
    """how a prediction is compared with the accepted answers; default `choice` if rows have choices, else `exact`"""
    tolerance: Annotated[float, Field(ge=0)] | None = None
    """of the score `number`: largest difference that counts as equal; default 0"""
    prompt: str | None = None
    """text of the prompt, with {question} and {choices}; default the question, then a lettered line for each choice"""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """longest answer in tokens; default as the score needs it, and enough for the longest accepted answer"""
    name: str | None = Field(default=None, pattern=r"^[^/\\]+$")
    """in tables and results; default the name of the file without its ending"""

    @field_validator("file", "media")
    @classmethod
    def _from_home(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser()

    @field_validator("prompt")
    @classmethod
    def _fillable(cls, prompt: str | None) -> str | None:
        try:
            places = [place for _, place, *_ in Formatter().parse(prompt or "{question}") if place is not None]
        except ValueError as error:
            raise ValueError(f"{error}; a brace that stands for itself is written twice") from error
        for place in places:
            if place not in _PLACES:
                raise ValueError(f"expected {{question}} and {{choices}} only, but there is {{{place}}}")
        if "question" not in places:
            raise ValueError("expected {question} in it")
        return prompt

    @model_validator(mode="after")
    def _tolerance_of_numbers(self) -> FileTask:
        if self.tolerance is not None and self.score != "number":
            raise key_error("tolerance", "goes with 'score: number' only")
        return self

    @property
    def title(self) -> str:
        """The name of the task."""
        return self.name or self.file.stem

    def open(self) -> Task:
        """The task. Its rows are read and checked now, their media when examples are asked for.

        Raises:
            ConfigError: names the file, the lines and what is wrong. `examples` of the task raises it as well.
        """
        path, folder = self.file.absolute(), (self.media or self.file.parent).absolute()
        if not folder.is_dir():
            raise ConfigError(f"{folder}: the folder of the media does not exist")
        rows = read_rows(path)
        name = self.score or _default_score(path, rows)
        examples = self._examples(path, rows, name, folder)

        def first(limit: int | None) -> list[FileExample]:
            found = examples[:limit]
            _check_media(path, rows[:limit], found)
            return found

        compare = SCORES[name].of if self.tolerance is None else number(self.tolerance)

        def score(prediction: str, example: FileExample) -> float:
            if name == "choice":
                place = picked(prediction, example.choices)
                return float(place is not None and example.choices[place] in example.answers)
            return max(compare(prediction, answer) for answer in example.answers)

        # A token is a byte of UTF-8 at least, so no accepted answer is longer. The last token ends it.
        longest = 0 if name == "choice" else max(len(answer.encode()) + 1 for e in examples for answer in e.answers)
        tokens = self.max_new_tokens or max(SCORES[name].max_new_tokens, longest)
        rules = json.dumps([name, self.tolerance, tokens])
        entry = self.model_dump(mode="json", exclude_none=True) | {"file": str(path), "media": str(folder)}
        given = {"name": self.title, "entry": entry, "rules": hashlib.sha256(rules.encode()).hexdigest()[:16]}
        return Task(first, score, tokens, rows[0].kind, digest=FileExample.digest, **given)

    def _examples(self, path: Path, rows: list[Row], score: ScoreName, folder: Path) -> list[FileExample]:
        problems, examples = Problems(path), []
        families = any(row.family is not None for row in rows)
        for row in rows:
            answers = _answers(row, score, problems)
            question = self._prompt(row, score, problems)
            media = tuple(folder / medium for medium in row.media)
            family = row.family or ("other" if families else "all")
            examples.append(FileExample(question, answers, row.choices, family, media, row.kind))
        problems.check()
        return examples

    def _prompt(self, row: Row, score: ScoreName, problems: Problems) -> str:
        prompt = self.prompt or (
            _PICK if score == "choice" else "{question}\n{choices}" if row.choices else "{question}"
        )
        if "{choices}" in prompt and not row.choices:
            problems.add(row.line, "the prompt has {choices}, and the row has none")
        return prompt.format(question=row.question, choices="\n".join(lettered(row.choices)))


def _default_score(path: Path, rows: list[Row]) -> ScoreName:
    with_choices = [bool(row.choices) for row in rows]
    if any(with_choices) and not all(with_choices):
        odd = rows[with_choices.index(not with_choices[0])]
        raise ConfigError(
            f"{path}, line {odd.line}: some rows have choices and some have none, so there is no default: give 'score'"
        )
    return "choice" if with_choices[0] else "exact"


def _answers(row: Row, score: ScoreName, problems: Problems) -> tuple[str, ...]:
    """The accepted answers; of choices their texts, also if the row gives letters."""
    problem = _wrong_choices(row.choices) if score == "choice" else None
    if problem is not None:
        problems.add(row.line, problem)
        return row.answers
    answers = []
    for answer in row.answers:
        if not plain(answer):
            problems.add(row.line, f"answer {answer!r} is nothing but a full stop")
        elif score == "number" and last_number(answer) is None:
            problems.add(row.line, f"answer {answer!r} is no number")
        elif score == "choice" and (place := _place(answer, row.choices)) is None:
            problems.add(
                row.line, f"answer {answer!r} is none of the choices {list(row.choices)}, and no letter of one"
            )
        else:
            answers.append(row.choices[place] if score == "choice" else answer)
    return tuple(answers)


def _wrong_choices(choices: tuple[str, ...]) -> str | None:
    texts = list(map(plain, choices))
    if not 2 <= len(texts) <= len(ascii_uppercase):
        return f"expected 2 to {len(ascii_uppercase)} choices, got {len(texts)}"
    if len(set(texts)) < len(texts):
        return f"a choice is there twice: {list(choices)}"
    letters = ascii_uppercase[: len(texts)].lower()
    if any(text in letters and text != letter for text, letter in zip(texts, letters, strict=True)):
        return f"a choice reads like the letter of another: {list(choices)}"
    return None


def _place(answer: str, choices: tuple[str, ...]) -> int | None:
    """Which of the choices a row's answer is, by its text or its letter."""
    texts, letters = list(map(plain, choices)), ascii_uppercase[: len(choices)]
    if plain(answer) in texts:
        return texts.index(plain(answer))
    return letters.index(answer.strip()) if answer.strip() in list(letters) else None


def _check_media(path: Path, rows: list[Row], examples: list[FileExample]) -> None:
    problems = Problems(path)
    if examples:
        media_files.look_at((path for example in examples for path in example.media), examples[0].kind)
    for row, example in zip(rows, examples, strict=True):
        for written, medium in zip(row.media, example.media, strict=True):
            if "://" in written:
                problems.add(row.line, f"{row.kind} {written!r}: a web address; save the file and give its path")
            elif problem := media_files.problem_of(medium, row.kind):
                problems.add(row.line, f"{row.kind} {written!r}: {problem} ({medium})")
    problems.check()
