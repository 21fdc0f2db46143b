# SPDX-License-Identifier: Apache-2.0
"""YAML files and what is wrong with them: every complaint names the file, the line, the key and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from .errors import ConfigError

Location = tuple[str | int, ...]


def nearest(name: str, known: Iterable[str]) -> str:
    """A phrase for an error message: the known names most like `name`, or all of them when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"


def key_error(key: str, problem: str) -> PydanticCustomError:
    """For validators of a whole mapping: an error that belongs to one key of it."""
    return PydanticCustomError("at_key", "{problem}", {"key": key, "problem": problem})


class ConfigModel(BaseModel):
    """Base of every schema here: frozen, and an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        # pydantic's own message for an extra key says neither which keys exist nor which one was meant
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields:
                raise key_error(str(key), f"unknown key; {nearest(str(key), cls.model_fields)}")
        return data


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice (PyYAML keeps the last one without a word)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                problem = f"key {key_node.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class YamlFile:
    """One parsed YAML file that knows on which line each of its keys stands.

    Args:
        path: the file.

    Raises:
        ConfigError: the file is missing or unreadable, is not YAML, or gives a key twice.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: no text, or no path
            reason = error.strerror if isinstance(error, OSError) else "not a text file"
            raise ConfigError(f"{self.path}: cannot be read: {reason}") from error
        try:
            self.data: Any = yaml.load(text, Loader=_Loader)
            self._root = yaml.compose(text, Loader=_Loader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            raise ConfigError(f"{self.path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error

    def line(self, location: Sequence[str | int]) -> int | None:
        """The line (from 1) of the deepest part of `location` that the file has, or None for an empty file."""
        node, line = self._root, None
        if node is not None:
            line = node.start_mark.line + 1
        for part in location:
            if isinstance(node, yaml.MappingNode):
                found = next((pair for pair in node.value if pair[0].value == str(part)), None)
                if found is None:
                    break
                node, line = found[1], found[0].start_mark.line + 1
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line + 1
            else:
                break
        return line

    def error(self, location: Sequence[str | int], problem: str) -> ConfigError:
        """The ConfigError for `problem` at `location`, e.g. `("methods", 2, "layers")`."""
        line = self.line(location)
        where = f"{self.path}, line {line}" if line else str(self.path)
        key = ".".join(map(str, location))
        return ConfigError(f"{where}: key '{key}': {problem}" if key else f"{where}: {problem}")


Model = TypeVar("Model", bound=BaseModel)


def validate(schema: type[Model], file: YamlFile) -> Model:
    """Checks a parsed file against a pydantic schema.

    Raises:
        ConfigError: one line for each complaint, "FILE, line N: key 'a.b': expected ..., got ...".
    """
    try:
        return schema.model_validate(file.data)
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False):
            location = _in_file(file.data, item["loc"])
            if item["type"] == "missing":
                location = (*location, item["loc"][-1])
            if item["type"] == "at_key":
                location = (*location, item["ctx"]["key"])
            problems.append(str(file.error(location, _problem(item))))
        raise ConfigError("\n".join(dict.fromkeys(problems))) from error


def _in_file(data: Any, location: Location) -> Location:
    """`location` without what pydantic puts in but the file does not have: names of union members and functions."""
    kept = []
    for part in location:
        if isinstance(data, dict) and part in data or isinstance(data, list) and isinstance(part, int):
            data = data[part]
            kept.append(part)
    return tuple(kept)


def _problem(item: dict) -> str:
    """One pydantic complaint in words."""
    if item["type"] == "missing":
        return "missing; it has no default"
    if item["type"] == "at_key":
        return item["msg"]
    message = item["msg"].removeprefix("Value error, ")
    if message.startswith("Input should be "):
        message = "expected " + message.removeprefix("Input should be ").removeprefix("a valid ")
    elif isinstance(item["input"], dict | list):
        return message  # a complaint of our own about a whole mapping says what it is about
    got = repr(item["input"])
    return f"{message}, got {got if len(got) <= 60 else got[:57] + '...'}"


def load_method_file(path: str | Path) -> dict | list:
    """Reads a method from a YAML file, in the form that `vtprune.build_method` takes.

    Args:
        path: a file with a mapping that holds `name`, parameters and a budget, or a list of names and such mappings.

    Returns:
        The mapping or the list. Names and parameters are checked by `build_method`, which knows the methods.

    Raises:
        ConfigError: unreadable file, or anything but those two forms.
    """
    file = YamlFile(path)
    entries = file.data if isinstance(file.data, list) else [file.data]
    if not entries:
        raise file.error((), "expected a method (a mapping with 'name') or a list of methods, got an empty list")
    for index, entry in enumerate(entries):
        location = (index,) if isinstance(file.data, list) else ()
        if isinstance(entry, str) and location:
            continue
        if not isinstance(entry, dict):
            raise file.error(location, f"expected a mapping with 'name', got {entry!r}")
        if not isinstance(entry.get("name"), str):
            raise file.error((*location, "name"), f"expected a method's name, got {entry.get('name')!r}")
    return file.data
