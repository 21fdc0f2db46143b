# SPDX-License-Identifier: Apache-2.0
"""The grid of an evaluation: a cell for each method, parameters, budget and seed, and what identifies its numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vtprune
import vtprune.adapters
import vtprune.eval
from vtprune.errors import ConfigError
from vtprune.eval.axes import values_of
from vtprune.eval.config import EvalConfig
from vtprune.eval.inputs import resolve_model
from vtprune.eval.inputs.classifiers import OPEN_CLIP
from vtprune.eval.method_rows import BASELINES, BUDGETS, ComposedEntry, MethodEntry
from vtprune.eval.tasks import AnyTask
from vtprune.eval.tasks.base import file_digest
from vtprune.eval.tasks.opening import source_hash
from vtprune.methods import build_method, list_methods
from vtprune.transformers_private import commit_of


@dataclass(frozen=True)
class Cell:
    """One line of results: a method, a budget and a seed."""

    method: str
    keep_ratio: float | None = None
    """as asked for; 1.0 for the full model, 0.0 without visual tokens"""
    given: dict[str, Any] = field(default_factory=dict)
    """parameters that the configuration sets"""
    seed: int | None = None
    keep_tokens: int | None = None
    """the budget as a count per crop; without a ratio and a count, the method's own schedule holds"""
    preset: str | None = None
    """name of the published setting, if the cell is one"""
    parts: tuple[dict[str, Any], ...] = ()
    """the methods of a composed row, each with its budget; `method` has their names then"""
    shared: dict[str, Any] = field(default_factory=dict)
    """parameters that the configuration sets for all rows; names do not show them"""

    @property
    def label(self) -> str:
        """For people: the method and its parameters, e.g. `fastv(layer=3)`; the same for all seeds and ratios.

        A composed row shows the budgets of its parts, too: `divprune(keep_ratio=0.5) + fastv(keep_ratio=0.5)`.
        """
        if self.preset is not None:
            return self.preset
        if self.parts:
            return " + ".join(_call(part["name"], _given(part)) for part in self.parts)
        given = dict(self.given)
        if self.keep_tokens is not None:
            given["keep_tokens"] = self.keep_tokens
        scheduled = self.keep_ratio is None and self.keep_tokens is None
        return _call(self.method, given, ["own schedule"] if scheduled else [])

    @property
    def title(self) -> str:
        """The label, the ratio and the seed."""
        ratio = "" if self.keep_ratio in (None, 0.0, 1.0) or self.parts else f" {self.keep_ratio:g}"
        return f"{self.label}{ratio}{'' if self.seed is None else f' seed{self.seed}'}"

    @property
    def spec(self) -> dict[str, Any] | list[dict[str, Any]]:
        """The argument for `vtprune.build_methods`."""
        if self.parts:
            return [self.shared | part for part in self.parts]
        set_here = {"seed": self.seed, "keep_ratio": self.keep_ratio, "keep_tokens": self.keep_tokens}
        return {"name": self.method, **self.shared, **self.given} | {k: v for k, v in set_here.items() if v is not None}

    @property
    def params(self) -> dict[str, Any]:
        """All parameters except the budget and the seed, with defaults, in JSON types.

        Of a composed row: `{"parts": [...]}`, the name and all parameters of each part, budget and seed included.
        """
        if self.method in BASELINES:
            return {}
        if self.parts:
            return {"parts": [{"name": part["name"]} | _fields(part) for part in self.spec]}
        return {key: value for key, value in _fields(self.spec).items() if key not in (*BUDGETS, "seed")}

    @property
    def fields(self) -> dict[str, Any]:
        """What a line of results says of the cell."""
        return {
            "method": self.method,
            "label": self.label,
            "params": self.params,
            "keep_ratio": self.keep_ratio,
            "keep_tokens": self.keep_tokens,
            "seed": self.seed,
        }

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of its methods; none for a baseline."""
        if self.method in BASELINES:
            return ()
        return tuple(part["name"] for part in self.parts) or (self.method,)


def _fields(spec: dict[str, Any]) -> dict[str, Any]:
    """All parameters of a method, with defaults, in JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(build_method(spec)), default=str))


def _given(part: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key != "name"}


def _call(name: str, given: dict[str, Any], more: Sequence[str] = ()) -> str:
    """A method and its parameters, e.g. `fastv(layer=3)`."""
    inside = [*(f"{key}={_short(value)}" for key, value in given.items()), *more]
    return f"{name}({', '.join(inside)})" if inside else name


def _short(value: Any) -> str:
    return str(value).replace(" ", "")


def expand(config: EvalConfig) -> list[Cell]:
    """All cells of one model on one task: the baselines, then the methods in their order, by budget and by seed."""
    cells = []
    for name in config.baselines:
        if name == "downsample":
            cells += [Cell(name, ratio) for ratio in config.keep_ratios]
        else:
            cells.append(Cell(name, {"full": 1.0, "zero": 0.0}[name]))
    for entry in config.methods:
        if isinstance(entry, ComposedEntry):
            name = " + ".join(part["name"] for part in entry.parts)
            for parts, shared in _placed(config, entry.parts):
                cells.append(Cell(name, entry.keep_ratio, parts=parts, shared=shared))
            continue
        for params in entry.rows():
            row = {"name": entry.name, **params}
            default = getattr(build_method(row), "seed", None)
            # A published setting is what it is.
            for (spec,), shared in [((row,), {})] if entry.preset else _placed(config, (row,)):
                given = {key: value for key, value in spec.items() if key not in ("name", "seed")}
                own = {"given": given, "preset": entry.preset, "shared": shared}
                for budget in _budgets(entry, config):
                    cells += [Cell(entry.name, seed=seed, **own, **budget) for seed in entry.seeds or (default,)]
    seen: set[str] = set()
    for cell in cells:
        if str(cell) in seen:
            raise ConfigError(f"the configuration has {cell.title} twice")
        seen.add(str(cell))
    return cells


Specs = tuple[dict[str, Any], ...]
"""The method of a row, or the methods of a composed one, as `vtprune.build_method` takes them."""


def _placed(config: EvalConfig, specs: Specs) -> list[tuple[Specs, dict[str, Any]]]:
    """A row with the positions that the configuration sets, and the parameters that all rows share.

    Several positions are several rows, which name them. What sets its own positions is left as it is.
    """
    unset = [spec for spec in specs if "positions" not in spec]
    if config.positions is None or not unset:
        return [(specs, {})]
    values = values_of(config.positions)
    taken = [value for value in values if all(_takes(spec, value) for spec in unset)]
    if not taken:
        names = ", ".join(spec["name"] for spec in unset)
        raise ConfigError(f"positions: {names} cannot have {' or '.join(values)}; give the row positions of its own")
    if len(values) == 1:
        return [(specs, {"positions": taken[0]})]
    return [(tuple({**spec, "positions": spec.get("positions", value)} for spec in specs), {}) for value in taken]


def _takes(spec: dict[str, Any], positions: str) -> bool:
    try:
        build_method({**spec, "positions": positions})
    except ConfigError:
        return False
    return True


def _budgets(entry: MethodEntry, config: EvalConfig) -> list[dict[str, Any]]:
    if entry.keep_tokens is not None:
        return [{"keep_tokens": count} for count in entry.keep_tokens]
    ratios = config.keep_ratios if entry.keep_ratios is None else entry.keep_ratios
    return [{"keep_ratio": ratio} for ratio in ratios] or [{}]


@dataclass(frozen=True)
class Identity:
    """Everything except the cell itself that the numbers of a cell depend on."""

    settings: dict[str, Any]
    """the parts of the configuration that hold for every cell"""
    model: str
    """fingerprint of the weights"""
    task: str
    """fingerprint of the task: its source code and its data"""
    versions: dict[str, str]

    @classmethod
    def of(cls, config: EvalConfig, task: AnyTask, digests: Sequence[str], model_path: str) -> Identity:
        """The identity of a run of one task on the model at `model_path` (folder or hub id).

        digests: of the examples that run, from `task.digests`.
        """
        settings = config.resolved(model_path, task.name)
        for key in ("model", "keep_ratios", "baselines", "methods", "positions", "include_path"):
            settings.pop(key, None)
        # The model of open_clip that comes with the library is computed by code that others do not run.
        own = {"open_clip_torch": version("open_clip_torch")} if model_path == resolve_model(OPEN_CLIP) else {}
        return cls(settings, _fingerprint(model_path), task.fingerprint(digests), versions() | own)

    def key(self, cell: Cell) -> str:
        """16 hex digits that change if a number of the cell could change."""
        parts = {
            **{name: value for name, value in dataclasses.asdict(self).items() if name != "versions"},
            # The commit is left out: the hash of the code says the same, also about uncommitted changes.
            "versions": {name: value for name, value in self.versions.items() if name != "commit"},
            "cell": [cell.method, cell.keep_ratio, cell.keep_tokens, cell.params, cell.seed],
            "source": [source_hash(list_methods()[name]) for name in cell.methods],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _fingerprint(model_path: str) -> str:
    """Of a folder: a hash of names, sizes and the first MiB of its files, so that gigabytes need not be read.

    Of a hub id: the id and the commit of the snapshot.
    """
    folder = Path(model_path)
    if not folder.is_dir():
        from transformers import AutoConfig

        try:
            return f"{model_path}@{commit_of(AutoConfig.from_pretrained(model_path))}"
        except (OSError, ValueError) as error:
            raise ConfigError(f"model {model_path!r} cannot be found: {str(error).splitlines()[0]}") from error
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name} {file_digest(path)}\n".encode())
    return digest.hexdigest()[:16]


@cache
def versions() -> dict[str, str]:
    """Versions of the interpreter and the libraries, the hash of vtprune's code, and its commit if it has one."""
    packages = {name: version(name) for name in ("vtprune", "torch", "transformers")}
    digest = hashlib.sha256()
    for root in (*vtprune.__path__, *vtprune.adapters.__path__, *vtprune.eval.__path__):
        for path in sorted(Path(root).rglob("*.py")):
            digest.update(path.read_bytes())
    found = {"python": platform.python_version(), **packages, "code": digest.hexdigest()[:16]}
    return found | ({"commit": commit} if (commit := _commit()) else {})


def _commit() -> str | None:
    """The commit of the checkout; None for an installed copy, which may lie in a repository of something else."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    if shutil.which("git") is None or git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return git("rev-parse", "HEAD")
