# SPDX-License-Identifier: Apache-2.0
"""How the answers to a task are made: settings of generation, stop strings, scores of given continuations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from vtprune.errors import ConfigError

MAX_NEW_TOKENS = 1024
"""For tasks that do not say how many."""
_SAMPLING = ("do_sample", "temperature", "top_p", "top_k")
_FILLED_IN = ["\n\n"]
"""The stop string that lmms-eval fills in if a task names none. No chat prompt has this delimiter of examples."""


@dataclass(frozen=True)
class Generation:
    """The `generation_kwargs` of a task."""

    options: dict[str, Any]
    """arguments of `vtprune.eval.inputs.answers`"""
    until: tuple[str, ...]
    """stop strings; an answer ends before the first of them"""

    @classmethod
    def of(cls, given: Mapping[str, Any], max_new_tokens: int) -> Generation:
        """
        Args:
            given: of a task. Temperature 0 or `do_sample: false` is greedy, whatever else is given. A temperature
                without `do_sample` samples. Arguments that transformers does not know are left out and logged.
            max_new_tokens: used if the task does not say.
        """
        settings = {key: value for key, value in given.items() if value is not None}
        until = settings.pop("until", [])
        until = [until] if isinstance(until, str) else list(until)
        temperature = settings.get("temperature")
        if temperature == 0 or not settings.get("do_sample", temperature is not None):
            settings = {key: value for key, value in settings.items() if key not in _SAMPLING}
        else:
            settings["do_sample"] = True
        known = GenerationConfig()
        if unknown := [key for key in settings if not hasattr(known, key)]:
            logger.warning(f"generation_kwargs not used: {', '.join(unknown)}")
        options = {"max_new_tokens": max_new_tokens, **{k: v for k, v in settings.items() if k not in unknown}}
        return cls(options, () if until == _FILLED_IN else tuple(filter(None, until)))

    def cut(self, text: str) -> str:
        """`text` up to the first of the stop strings."""
        for stop in self.until:
            text = text.split(stop)[0]
        return text.strip()


def lengths(new: Tensor, model: Any) -> list[int]:
    """Generated tokens in each row of `new` (batch, tokens), with the end-of-sequence token, without padding."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return [new.shape[1]] * len(new)
    end = torch.isin(new, torch.tensor(ends, device=new.device)).int()
    return ((end.cumsum(1) - end) == 0).sum(1).tolist()


@dataclass(frozen=True)
class Scored:
    """A model's score of a continuation."""

    loss: float
    """mean negative log-likelihood of its tokens"""
    greedy: bool
    """whether greedy decoding gives this continuation"""
    tokens: int


class _Forced(LogitsProcessor):
    """Makes generation take the given tokens (batch, steps)."""

    def __init__(self, tokens: Tensor, prompt: int):
        self.tokens = tokens
        self.prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.tokens[:, input_ids.shape[1] - self.prompt, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


@torch.inference_mode()
def score_continuations(model: Any, processor: Any, inputs: Any, continuations: Sequence[str]) -> list[Scored]:
    """Scores one given continuation for each prompt.

    Generation is forced to give these tokens, so positions, masks and the pruned cache are those of an answer on every
    model.
    """
    rows = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in continuations]
    if not all(rows):
        raise ConfigError("a continuation without a token has no likelihood")
    steps = max(map(len, rows))
    inputs = inputs.to(model.device, model.dtype)
    # A row that has ended goes on with its last token, which is not scored.
    tokens = torch.tensor([row + row[-1:] * (steps - len(row)) for row in rows], device=model.device)
    output = model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        num_beams=1,
        logits_processor=LogitsProcessorList([_Forced(tokens, inputs["input_ids"].shape[1])]),
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(output.logits, 1).float()
    likelihood = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    same = logits.argmax(-1) == tokens
    return [
        Scored(-float(likelihood[i, :length].mean()), bool(same[i, :length].all()), length)
        for i, length in enumerate(map(len, rows))
    ]
