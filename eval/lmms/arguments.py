# SPDX-License-Identifier: Apache-2.0
"""The arguments in `--model_args`, checked before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from vtprune.config import ConfigModel
from vtprune.errors import ConfigError
from vtprune.eval.lmms.decoding import MAX_NEW_TOKENS
from vtprune.eval.running.measure import NOTHING_PRUNED
from vtprune.methods import Method, build_methods


def _json(value: Any) -> Any:
    """lmms-eval hands on what stands in braces as a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from error


def _key(item: dict) -> list[str]:
    """The argument that an error of pydantic names, if it names one."""
    return [item["ctx"]["key"]] if item["type"] == "at_key" else [str(part) for part in item["loc"][:1]]


class Arguments(ConfigModel):
    """Any model that vtprune has an adapter for, with a method, or unpruned if none is given."""

    pretrained: str
    """folder or hub id; `digitscenes` and `digitscenes_video` come with the library"""
    method: str | dict | list | None = None
    """name of a method, `@FILE.yaml` with a method or a list of them, or the same inline as JSON; default none. Give it
    inline with lmms-eval's `--use_cache`, which knows the name of a file, not what is in it."""
    keep_ratio: float | None = None
    """budget of a single method"""
    keep_tokens: int | None = None
    """the same as a count per crop"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """default that of the weights"""
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """attention back end; default transformers' choice"""
    device: str | None = Field(default=None, pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """default each process's accelerator, or the CPU; `auto` spreads the model over all accelerators"""
    batch_size: int = Field(default=1, ge=1)
    """prompts at a time"""
    num_frames: int | None = Field(default=None, ge=1)
    """frames sampled from a video; default the processor's choice"""
    fps: float | None = Field(default=None, gt=0)
    """the same as frames per second"""
    processor_kwargs: Annotated[dict[str, Any], BeforeValidator(_json)] = {}
    """further arguments of the processor, as JSON: {"max_pixels": 1003520}"""
    max_new_tokens: int = Field(default=MAX_NEW_TOKENS, ge=1)
    """for tasks that do not say how many"""

    @model_validator(mode="after")
    def _one_way_to_sample(self) -> Arguments:
        if self.num_frames is not None and self.fps is not None:
            raise ValueError("num_frames and fps: give one of them")
        return self

    @classmethod
    def of(cls, given: dict[str, Any]) -> Arguments:
        """Checked arguments. Raises ConfigError naming every key that is wrong."""
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            problems = [
                ": ".join(("model_args", *_key(item), item["msg"].removeprefix("Value error, ")))
                for item in error.errors(include_url=False)
            ]
            raise ConfigError("\n".join(problems)) from error

    @property
    def spec(self) -> Any:
        """The method as `vtprune.build_methods` takes it, or None: a name, a mapping, a list of them, or a file."""
        if isinstance(self.method, str) and self.method.startswith("@"):
            return Path(self.method[1:])
        if isinstance(self.method, str) and self.method.startswith(("{", "[")):
            try:
                return json.loads(self.method)
            except json.JSONDecodeError as error:
                raise ConfigError(f"model_args: method: not valid JSON: {error}") from error
        return self.method

    def methods(self) -> list[Method]:
        """The methods that prune; `NOTHING_PRUNED` if none is given."""
        budget = {key: getattr(self, key) for key in ("keep_ratio", "keep_tokens") if getattr(self, key) is not None}
        if self.method is None:
            if budget:
                raise ConfigError(f"model_args: {', '.join(budget)} without a method")
            return build_methods(NOTHING_PRUNED)
        return build_methods(self.spec, **budget)

    @property
    def frames(self) -> dict[str, Any]:
        """Arguments of a processor that gets a video."""
        if self.num_frames is None and self.fps is None:
            return {}
        return {"num_frames": self.num_frames, "fps": self.fps}  # both, since the processor's default would contradict
