# SPDX-License-Identifier: Apache-2.0
"""The published JSON schema: accepts what the library accepts, refuses what an editor should underline."""

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import vtprune.eval
from vtprune.cli import app
from vtprune.eval.config import load_config
from vtprune.methods import list_methods

CONFIGS = Path(vtprune.eval.__file__).parent / "configs"
MINIMAL = {"model": "digitscenes", "keep_ratios": [0.5]}
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
UNCHECKED = {"$schema", "title", "description", "default", "format", "uniqueItems"}


def fits(schema, value):
    """A validator of the words that the schema uses, and of no others."""
    checks = {
        "type": lambda kind: isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool)),
        "enum": lambda values: value in values,
        "const": lambda wanted: value == wanted,
        "anyOf": lambda parts: any(fits(part, value) for part in parts),
        "pattern": lambda text: re.search(text, value),
        "minimum": lambda bound: value >= bound,
        "maximum": lambda bound: value <= bound,
        "exclusiveMinimum": lambda bound: value > bound,
        "exclusiveMaximum": lambda bound: value < bound,
        "minItems": lambda count: len(value) >= count,
        "maxItems": lambda count: len(value) <= count,
        "prefixItems": lambda parts: all(fits(part, item) for part, item in zip(parts, value, strict=False)),
        "items": lambda part: all(fits(part, item) for item in value),
        "properties": lambda parts: all(fits(parts[key], item) for key, item in value.items() if key in parts),
        "required": lambda keys: set(keys) <= set(value),
        "additionalProperties": lambda allowed: allowed or set(value) <= set(schema.get("properties", ())),
    }
    assert set(schema) <= set(checks) | UNCHECKED, set(schema) - set(checks) - UNCHECKED
    # The type first: the other words only make sense of the right one.
    words = sorted(set(schema) & set(checks), key=lambda word: word != "type")
    return all(checks[word](schema[word]) for word in words)


@pytest.fixture(scope="module")
def schema():
    result = CliRunner().invoke(app, ["schema"])
    assert result.exit_code == 0
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", ["quickstart", "video", "clip"])
def test_the_configurations_that_come_with_the_library(schema, name):
    assert fits(schema, yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))


GOOD = [
    {"model": ["a/b", "c/d"], "task": ["digitscenes"]},
    {"task": ["lmms:pope", "suite:images", "digitscenes"], "include_path": "tasks"},
    {"task": {"file": "mine.jsonl", "media": "photos", "score": "number", "tolerance": 0.5, "name": "mine"}},
    {"task": ["digitscenes", {"file": "mine.csv", "prompt": "{question}", "max_new_tokens": 3}]},
    {"methods": ["random", {"name": "random", "seeds": [0, 1], "keep_tokens": [4]}]},
    {"methods": [{"name": "fastv", "layer": 3, "grid": {"share": [0.5, 0.2]}, "keep_ratios": []}]},
    {"methods": [{"name": "transprune", "layers": [2, 4, 6], "grid": {"schedule": [[0.9, 0.5, 0.1]]}}]},
    {"methods": [{"name": "fastv", "grid": {"layer": [2, 3], "keep_ratio": [0.5, 0.4]}}]},
    {"methods": [{"name": "random", "grid": {"seed": [2, 3], "keep_tokens": [5]}}]},
    {"methods": [{"preset": "fastv/llava-1.5-7b/192"}]},
    {"methods": [["fastv", {"name": "divprune", "keep_ratio": 0.5}], [{"name": "mmtok", "keep_tokens": 9}, "pdrop"]]},
    {"output": "there", "limit": None, "max_new_tokens": 3, "attention": "eager"},
]
BAD = [
    {"model": 3},
    {"modle": "a/b"},
    {"task": "digitscene"},
    {"task": {"media": "photos"}},
    {"task": {"file": "mine.csv", "scor": "exact"}},
    {"task": {"file": "mine.csv", "score": "fuzzy"}},
    {"task": ["digitscenes", {"file": "mine.csv", "max_new_tokens": 0}]},
    {"keep_ratios": [1.5]},
    {"keep_ratios": []},
    {"baselines": ["fulll"]},
    {"batch_size": 0},
    {"dtype": "float8"},
    {"methods": ["fastvv"]},
    {"methods": [{"name": "fastv", "layr": 3}]},
    {"methods": [{"name": "fastv", "layer": "two"}]},
    {"methods": [{"name": "fastv", "seeds": [1]}]},
    {"methods": [{"name": "fastv", "grid": {"share": [0.5, 2]}}]},
    {"methods": [{"name": "fastv", "grid": {"seed": [2]}}]},
    {"methods": [{"name": "fastv", "grid": {"keep_ratio": [2]}}]},
    {"methods": [{"preset": "fastv/llava-1.5-7b/193"}]},
    {"methods": [{"file": 3}]},
    {"methods": [["fastv"]]},
    {"methods": [["fastv", {"name": "divprune", "keep_ratio": 2}]]},
    {"methods": [["fastv", {"name": "divprune", "seeds": [1]}]]},
    {"methods": [["fastv", "mmtokk"]]},
]


@pytest.mark.parametrize("changes", GOOD, ids=str)
def test_what_both_accept(schema, tmp_path, changes):
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**MINIMAL, **changes}))
    load_config(tmp_path / "grid.yaml")
    assert fits(schema, {**MINIMAL, **changes})


@pytest.mark.parametrize("changes", BAD, ids=str)
def test_what_both_refuse(schema, tmp_path, changes):
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**MINIMAL, **changes}))
    with pytest.raises(vtprune.ConfigError):
        load_config(tmp_path / "grid.yaml")
    assert not fits(schema, {**MINIMAL, **changes})


def test_every_method_is_in_it(schema):
    rows = schema["properties"]["methods"]["items"]["anyOf"]
    named = {row["properties"]["name"]["const"] for row in rows if "name" in row.get("properties", ())}
    assert named == set(list_methods()) - {"zero"}
