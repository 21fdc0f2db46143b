# SPDX-License-Identifier: Apache-2.0
"""The settings of `vtprune bench`: a YAML file, options, or both. They are checked before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from vtprune.config import ConfigModel, YamlFile, validate
from vtprune.errors import ConfigError, VTPruneError
from vtprune.eval.bench.linear import onednn_available
from vtprune.eval.bench.shapes import shape_of
from vtprune.eval.config import find_config
from vtprune.methods import build_method

KeepRatio = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]

METHODS = ("uniform", "vtc_cls", "divprune", "mmtok", "fastv", "transprune")
BATCHES_ON_GPU, BATCHES_ON_CPU = (1, 8), (1,)
REPEATS_ON_GPU, REPEATS_ON_CPU = 10, 3


class BenchMethod(ConfigModel):
    """A method, its parameters, and the budgets it is measured at."""

    name: str
    params: dict[str, Any] = {}
    """parameters other than the budget, as written"""
    keep_ratios: tuple[KeepRatio, ...] | None = None
    """default: those of the file"""

    @model_validator(mode="after")
    def _buildable(self) -> BenchMethod:
        budgets = {"keep_ratio", "keep_tokens"} & set(self.params)
        if budgets:
            raise ValueError(f"{self.name}: the budget of a row is 'keep_ratios', not {budgets.pop()!r}")
        try:
            build_method({"name": self.name, **self.params})
        except VTPruneError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def label(self) -> str:
        """For people: the method and what was set, e.g. `fastv(layer=3)`."""
        inside = ", ".join(f"{key}={value}" for key, value in self.params.items())
        return f"{self.name}({inside})" if inside else self.name


def _entry(value: Any) -> Any:
    """A bare name, or a flat mapping whose other keys are the method's parameters."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict):
        fields = {key: value[key] for key in ("name", "keep_ratios") if key in value}
        return {**fields, "params": {key: item for key, item in value.items() if key not in fields}}
    return value


class BenchConfig(ConfigModel):
    """The settings of `vtprune bench`: a model, methods and budgets, batch sizes, number of rounds."""

    shape: str | None = None
    """a published model's shape, with random weights; give this or `model`"""
    layers: Count | None = None
    """decoder layers of a shape, for machines without memory for all of them; default all"""
    model: str | None = None
    """folder or hub id of a model; `digitscenes` is one that comes with the library"""
    image_size: tuple[Count, Count] = (672, 672)
    """height and width of the image that a `model` is shown; shapes come with theirs"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """attention back end, the same for every row"""
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    linear: Literal["onednn", "torch"] | None = None
    """the library for the linear layers of all rows: oneDNN, or torch's choice; default oneDNN for float32 on a CPU,
    unless steps are compiled"""
    cache: Literal["dynamic", "static"] = "dynamic"
    """KV cache of all rows; `static` as of `generate(cache_implementation="static")`, for the longest of the answers"""
    compile: bool = False
    """whether decoding steps are compiled, in all rows; needs a static cache"""
    text_tokens: int = Field(default=128, ge=2)
    """text tokens of a shape's prompt, half of them before the image"""
    batch_sizes: tuple[Count, ...] | None = Field(default=None, min_length=1)
    """default 1 and 8 on a GPU, and 1 on a CPU, where eight prompts take minutes a round"""
    output_tokens: tuple[Count, ...] = Field(default=(1, 32, 512), min_length=1)
    """lengths of answers for which times are given"""
    steps: Count = 2
    """decoding steps timed at each of these lengths, in each round"""
    keep_ratios: tuple[KeepRatio, ...] = Field(default=(0.11,), min_length=1)
    methods: tuple[Annotated[BenchMethod, BeforeValidator(_entry)], ...] = Field(
        default=tuple(BenchMethod(name=name) for name in METHODS), min_length=1
    )
    repeats: Count | None = None
    """rounds; in each, every row is measured once; default 10 on a GPU, 3 on a CPU"""
    output: Path | None = None
    """folder for bench.jsonl and bench.md; default none"""

    @model_validator(mode="after")
    def _one_model(self) -> BenchConfig:
        if (self.shape is None) == (self.model is None):
            raise ValueError("give 'shape' or 'model', one of the two")
        if self.layers is not None and self.shape is None:
            raise ValueError("'layers' is for a 'shape'; a 'model' keeps its own")
        return self

    @field_validator("shape")
    @classmethod
    def _known_shape(cls, shape: str | None) -> str | None:
        if shape is not None:
            try:
                shape_of(shape)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return shape

    @model_validator(mode="after")
    def _compiled_with_fixed_lengths(self) -> BenchConfig:
        if self.compile and self.cache != "static":
            raise ValueError("'compile' needs cache 'static': lengths that grow would be compiled again and again")
        if self.compile and self.linear == "onednn":
            raise ValueError("'compile' needs linear 'torch': the compiler does not see into layers of oneDNN")
        return self

    @model_validator(mode="after")
    def _linear_where_it_is(self) -> BenchConfig:
        if self.linear == "onednn" and not self._takes_onednn:
            raise ValueError("linear 'onednn' is for float32 on a CPU, with a torch that was built with oneDNN")
        return self

    @field_validator("output_tokens")
    @classmethod
    def _ascending(cls, lengths: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(lengths)))

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def _takes_onednn(self) -> bool:
        return not self.on_gpu and self.dtype == "float32" and onednn_available()

    @property
    def computes_linear(self) -> Literal["onednn", "torch"]:
        """`linear` with the default filled in."""
        return self.linear or ("onednn" if self._takes_onednn and not self.compile else "torch")

    @property
    def batches(self) -> tuple[int, ...]:
        """`batch_sizes` with the default filled in."""
        return self.batch_sizes or (BATCHES_ON_GPU if self.on_gpu else BATCHES_ON_CPU)

    @property
    def rounds(self) -> int:
        """`repeats` with the default filled in."""
        return self.repeats or (REPEATS_ON_GPU if self.on_gpu else REPEATS_ON_CPU)

    def resolved(self) -> dict[str, Any]:
        """The configuration as JSON, with defaults filled in and without the output folder."""
        filled = {"batch_sizes": list(self.batches), "repeats": self.rounds, "linear": self.computes_linear}
        return self.model_dump(mode="json", exclude={"output"}) | filled


class _Options:
    """Options of the command line, which stand in for a file."""

    def __init__(self, data: dict[str, Any]):
        self.data = data

    def error(self, location: tuple[str | int, ...], problem: str) -> ConfigError:
        return ConfigError(f"--{str(location[0]).replace('_', '-')}: {problem}" if location else problem)


def load_config(path: str | Path | None = None, **overrides: Any) -> BenchConfig:
    """Reads and checks a file, or options alone.

    Args:
        path: YAML file with fields of `BenchConfig`, or the name of one that comes with the package; None for none.
        overrides: fields that replace those of the file; None leaves the file's value.

    Raises:
        ConfigError: names the file and line, or the option, and what was expected.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    if path is None:
        return validate(BenchConfig, _Options(given))
    file = YamlFile(find_config(path))
    if not isinstance(file.data, dict):
        got = type(file.data).__name__
        raise file.error((), f"expected a mapping with {', '.join(BenchConfig.model_fields)}, got {got}")
    file.data.setdefault("output", f"results/{file.path.stem}")
    file.data.update(given)
    return validate(BenchConfig, file)
