# SPDX-License-Identifier: Apache-2.0
"""`vtprune doctor`: whether the library's promises hold on this machine, with what is installed on it."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.nn.functional import interpolate

import vtprune
from vtprune.errors import ConfigError
from vtprune.testing import families
from vtprune.testing.attention import SHARE_OF_WEIGHTS, WEIGHTS
from vtprune.testing.cases import LOGITS, MOST, NOISE, ROUNDINGS, SHARE_OF_LOGITS, Case, Result
from vtprune.testing.promises import CHECKS, METHODS, WORDS, run_checks, told
from vtprune.transformers_private import is_tested_release, releases

PACKAGES = ("accelerate", "huggingface_hub", "numpy", "pillow", "safetensors", "tokenizers", "torchvision", "triton")
"""Packages that a model's numbers or loading depend on, beside torch and transformers."""

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}

SIZES = ((196, 140), (112, 168), (140, 140), (168, 112))
"""Widths and heights, in pixels, of the pictures for a real checkpoint."""
PROMPTS = (
    (1, "What is to be seen here?"),
    (2, "Compare the two pictures: which colours and shapes do both have, and which only one of them?"),
    (1, "Describe the picture in one word."),
)
"""Pictures and question of each prompt for a real checkpoint."""

_STYLES = {"ok": "green", "failed": "bold red", "refused": "yellow", "error": "bold red"}
_WORST = ("error", "failed", "refused", "ok")


@dataclass(frozen=True)
class Settings:
    """How models are run."""

    device: str = "cpu"
    dtype: str = "float32"
    attention: str | None = None
    """attention back end; None: sdpa for tiny models, transformers' choice for a checkpoint"""

    def __post_init__(self):
        from vtprune.eval.inputs import check_device

        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype {self.dtype!r}: expected {', '.join(DTYPES)}")
        check_device(self.device)
        if "flash" in (self.attention or "") and self.dtype == "float32":
            raise ConfigError(f"--attention {self.attention} computes in bfloat16 or float16: give --dtype, too")


@dataclass(frozen=True)
class Row:
    """What was found on one model."""

    name: str
    results: Sequence[Result] = ()
    absent: str | None = None
    """why nothing was checked"""


# -- what is checked --------------------------------------------------------------------------------------------------


def check_family(name: str, settings: Settings) -> Row:
    """All checks on a family's tiny model."""
    if not families.is_available(name):
        return Row(name, absent=_absence(name))
    plain = families.build(name)
    batch = families.batch(name, plain, samples=2).to(settings.device, DTYPES[settings.dtype])
    model = plain
    if settings.attention is not None:
        try:
            model = families.build(name, settings.attention)
        except (ImportError, ValueError) as error:
            return Row(name, absent=f"no {settings.attention}: {_first_line(error)}")
    methods = METHODS if name in families.PRUNED_INSIDE else METHODS[:1]  # before the LLM
    return Row(name, run_checks(Case(model.to(settings.device, DTYPES[settings.dtype]), batch), methods))


def _absence(name: str) -> str:
    """Why the model of a family cannot be built."""
    package = families.FAMILIES[name].package
    return f"not in transformers {transformers.__version__}" if find_spec(package) else f"{package} is not installed"


def check_checkpoint(source: str, settings: Settings) -> Row:
    """All checks on a checkpoint, folder or hub id. Raises VTPruneError if it cannot be loaded or has no adapter."""
    from vtprune.eval.inputs import load_model

    model, processor = load_model(source, settings.dtype, settings.attention, settings.device)
    vtprune.adapter_for(model)
    batch = checkpoint_batch(model, processor).to(settings.device, DTYPES[settings.dtype])
    return Row(type(model).__name__, run_checks(Case(model, batch)))


def checkpoint_batch(model: Any, processor: Any) -> families.Batch:
    """Three prompts with four pictures of different sizes, as a checkpoint's own processor lays them out."""
    from vtprune.eval.inputs import conversation_inputs

    pictures = iter([picture(size, seed) for seed, size in enumerate(SIZES)])
    conversations = []
    for count, question in PROMPTS:
        shown = [{"type": "image", "image": next(pictures)} for _ in range(count)]
        conversations.append([{"role": "user", "content": [*shown, {"type": "text", "text": question}]}])
    try:
        inputs = dict(conversation_inputs(processor, conversations))
        singles = [dict(conversation_inputs(processor, [one])) for one in conversations]
    except Exception as error:
        raise ConfigError(f"the processor takes no prompts with pictures: {_first_line(error)}") from error
    return families.Batch(
        inputs=inputs,
        singles=singles,
        visual_ids=tuple(vtprune.adapter_for(model).visual_token_ids.values()),
        pads=(inputs["attention_mask"] == 0).sum(1).tolist(),
        padding_side="left",
    )


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """An RGB picture of coloured clouds, width and height in pixels; the same seed gives the same picture."""
    noise = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    pixels = interpolate(noise, size[::-1], mode="bilinear", align_corners=True)[0]
    channels = [bytes((255 * channel).byte().flatten().tolist()) for channel in pixels]
    return Image.merge("RGB", [Image.frombytes("L", size, channel) for channel in channels])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# -- what is shown ----------------------------------------------------------------------------------------------------


def machine() -> Table:
    """Versions and devices."""
    table = Table.grid(padding=(0, 2))
    tested = "" if is_tested_release() else "NOT TESTED: "
    table.add_row("vtprune", vtprune.__version__)
    table.add_row("transformers", f"{transformers.__version__} ({tested}{releases().partition(', and ')[2]})")
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    table.add_row("torch", f"{torch.__version__}{cuda}")
    table.add_row("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    others = [f"{name} {found}" for name in PACKAGES if (found := _version(name)) is not None]
    table.add_row("beside them", ", ".join(others))
    table.add_row("devices", "\n".join(_devices()))
    return table


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    found = [f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads in use"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def families_table(rows: Sequence[Row]) -> Table:
    """A row a family, a column a check: the worst of its methods."""
    table = Table("family", *CHECKS)
    for row in rows:
        cells = [_cell([result for result in row.results if result.check == name]) for name in CHECKS]
        table.add_row(row.name, *(cells if row.results else [Text("-")] * len(CHECKS)))
    return table


def checkpoint_table(row: Row) -> Table:
    """A row a check and method, with what was measured."""
    table = Table("check", "method", "result", "measured", "allowed", title=row.name, title_justify="left")
    for result in row.results:
        numbers = ("-" if x is None else f"{x:.2g}" for x in (result.measured, result.tolerance))
        table.add_row(result.check, result.method, _cell([result]), *numbers)
    return table


def _cell(results: Sequence[Result]) -> Text:
    statuses = {result.status for result in results}
    worst = next((status for status in _WORST if status in statuses), None)
    return Text("-") if worst is None else Text(WORDS[worst], style=_STYLES[worst])


def tolerances(dtype: str) -> str:
    """The rules by which numbers count as equal in a dtype, in words."""
    if dtype == "float32":
        return (
            f"Tolerances, float32: keep all exactly; logits {LOGITS:g}, or {SHARE_OF_LOGITS:g} of the largest logit if "
            f"that is more; attention weights {WEIGHTS:g}."
        )
    return (
        f"Tolerances, {dtype}: keep all exactly; logits {NOISE:g} times the unpatched model's own difference between "
        f"a padded batch and single samples, at least {ROUNDINGS:g} roundings of the largest logit, at most {MOST:.0%} "
        f"of it; attention weights {SHARE_OF_WEIGHTS:.0%} of the largest weight."
    )


def explanations(rows: Sequence[Row]) -> list[str]:
    """A line for everything that is not ok: what was measured, and what it means."""
    lines = [f"{row.name}: {row.absent}" for row in rows if row.absent is not None]
    for row in rows:
        for result in row.results:
            if not result.passed:
                lines.append(told(replace(result, where=row.name), CHECKS[result.check].broken))
    return lines


# -- the command ------------------------------------------------------------------------------------------------------


def run(console: Console, settings: Settings, *, model: str | None = None, family: str | None = None) -> bool:
    """Check and print. Returns whether every promise holds.

    Args:
        model: folder or hub id of a checkpoint, instead of the tiny models.
        family: a name of `families.NAMES`, instead of all.

    Raises:
        ConfigError: an option cannot be used. UnsupportedModelError: no adapter knows the checkpoint.
    """
    if family is not None and family not in families.NAMES:
        raise ConfigError(f"--family {family!r}: expected one of {', '.join(families.NAMES)}")
    console.print(machine())
    console.print()
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would write between the rows
    try:
        if model is not None:
            rows = [check_checkpoint(model, settings)]
            console.print(checkpoint_table(rows[0]))
        else:
            rows = []
            with console.status("") as status:
                for name in families.NAMES if family is None else (family,):
                    status.update(f"checking {name}")
                    rows.append(check_family(name, settings))
            console.print(families_table(rows))
    finally:
        transformers.logging.set_verbosity(verbosity)
    for line in explanations(rows):
        console.print(f"* {line}", highlight=False, markup=False)
    console.print(tolerances(settings.dtype), highlight=False)
    holds = all_hold(rows, refusals=model is not None)
    console.print(verdict(rows, holds))
    return holds


def verdict(rows: Sequence[Row], holds: bool) -> Text:
    """The last line."""
    if holds:
        return Text("Every promise holds.")
    checked = any(row.results for row in rows)
    return Text("NOT every promise holds." if checked else "Nothing was checked.", style="bold red")


def all_hold(rows: Sequence[Row], *, refusals: bool) -> bool:
    """Whether something was checked and nothing failed.

    refusals: whether a refusal is all right. On a tiny model it is not: the library is made for it.
    """
    results = [result for row in rows for result in row.results]
    allowed = {"ok", "refused"} if refusals else {"ok"}
    return any(result.passed for result in results) and all(result.status in allowed for result in results)
