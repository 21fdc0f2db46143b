# SPDX-License-Identifier: Apache-2.0
"""The JSON schema of evaluation files, with the parameters of every method, for editors that complete and check."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any

from pydantic import TypeAdapter

from vtprune.eval.axes import AXES
from vtprune.eval.config import EvalConfig
from vtprune.eval.method_rows import BASELINES, BUDGETS, LISTS, MethodEntry
from vtprune.eval.presets import presets
from vtprune.eval.tasks import FileTask, task_names
from vtprune.eval.tasks.opening import LMMS, SUITE
from vtprune.eval.tasks.suites import suite_names
from vtprune.methods import Method, list_methods

_SHARED = ("seeds", "keep_ratios", "keep_tokens")


def json_schema() -> dict[str, Any]:
    """The schema of the file as people write it: a name may stand for a list, and methods are flat mappings."""
    schema = EvalConfig.model_json_schema()
    properties = schema["properties"]
    fields_of_entry = MethodEntry.model_json_schema()["properties"]
    methods = {name: method for name, method in list_methods().items() if name not in BASELINES}
    properties["model"] = _one_or_more({"type": "string"}) | {"description": "Folders or hub ids of models."}
    names = {"enum": [*task_names(), *(f"{SUITE}{name}" for name in suite_names())]}
    tasks = [names, {"type": "string", "pattern": f"^{LMMS}.+"}, _file_task()]
    properties["task"] = _one_or_more({"anyOf": tasks}) | {"default": "digitscenes"}
    properties["include_path"] = _one_or_more({"type": "string"}) | {"description": "Folders with tasks of lmms-eval."}
    rows = [_row(name, method, fields_of_entry) for name, method in methods.items()]
    preset = {"preset": {"enum": list(presets())}, "seeds": fields_of_entry["seeds"]}
    parts = [{"enum": list(methods)}, *(_part(name, method) for name, method in methods.items())]
    composed = {"type": "array", "items": {"anyOf": parts}, "minItems": 2}
    others = [_mapping(preset, ["preset"]), _mapping({"file": {"type": "string"}}, ["file"])]
    properties["methods"]["items"] = {"anyOf": [{"enum": list(methods)}, *others, *rows, composed]}
    for name in (*AXES, "positions"):
        properties[name] = _value_or_list(properties[name])
    schema["required"] = [key for key in schema["required"] if key != "output"]  # its default is the file's name
    schema.pop("$defs", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _file_task() -> dict[str, Any]:
    """The schema of a task of own data."""
    schema = FileTask.model_json_schema()
    schema.pop("title")
    return schema


def _one_or_more(item: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [item, {"type": "array", "items": item, "minItems": 1, "uniqueItems": True}]}


def _value_or_list(setting: dict[str, Any]) -> dict[str, Any]:
    """The schema of a setting that may have several values, from pydantic's, which only tells the two apart by code."""
    (one,) = (part for part in _alternatives(setting) if part.get("type") not in ("array", "null"))
    kept = {key: value for key, value in setting.items() if key not in ("anyOf", "oneOf")}
    return _one_or_more(one) | kept


def _alternatives(schema: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    return [deeper for part in parts for deeper in _alternatives(part)] or [schema]


def _mapping(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _row(name: str, method: type[Method], fields_of_entry: dict[str, Any]) -> dict[str, Any]:
    """The schema of a row of one method with its parameters."""
    parameters = {field: schema for field, schema in _parameters(method).items() if field not in BUDGETS}
    lists = {field: {"type": "array", "items": parameter, "minItems": 1} for field, parameter in parameters.items()}
    shared = {key: fields_of_entry[key] for key in _SHARED if key != "seeds" or "seed" in parameters}
    lists |= {field: fields_of_entry[key] for field, key in LISTS.items() if key in shared}
    grid = {"grid": {"type": "object", "properties": lists, "additionalProperties": False}}
    summary = inspect.getdoc(method).splitlines()[0]
    return _mapping({"name": {"const": name}, **parameters, **shared, **grid}, ["name"]) | {"description": summary}


def _part(name: str, method: type[Method]) -> dict[str, Any]:
    """The schema of a part of a composed row: a method with its parameters and its budget."""
    return _mapping({"name": {"const": name}, **_parameters(method)}, ["name"])


def _parameters(method: type[Method]) -> dict[str, Any]:
    """Schemas of all parameters of a method, budgets included."""
    hints = typing.get_type_hints(method, include_extras=True)
    return {field.name: TypeAdapter(hints[field.name]).json_schema() for field in dataclasses.fields(method)}
