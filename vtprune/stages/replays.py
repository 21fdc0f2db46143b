# SPDX-License-Identifier: Apache-2.0
"""Choices that are made again: `generate()` without a KV cache sends the whole prompt once more for every token."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from vtprune.tokens import Selection


class Replays:
    """The choices of prompts whose encoded images were handed in, for as long as these live."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], list[tuple[Tensor, list[Selection]]]] = {}
        """ids of encoder outputs -> prompts with these images, and what was chosen for each."""
        self._choices: list[Selection] = []
        self._next: int | None = None

    @property
    def replaying(self) -> bool:
        """Whether the choices of the present call were made before."""
        return self._next is not None

    def begin(self, features: tuple[Any, ...], ids: Tensor | None) -> None:
        """Begin a prefill.

        features: the encoder's outputs. ids (batch, length): the prompts with what was generated so far; None if the
        call cannot be the repetition of another one.
        """
        self._choices, self._next = [], None
        if ids is None:
            return
        key = tuple(map(id, features))
        prompts = self._known.setdefault(key, [])
        if not prompts:
            for output in features:
                weakref.finalize(output, self._known.pop, key, None).atexit = False
        earlier = [(prompt, choices) for prompt, choices in prompts if _continues(ids, prompt)]
        if earlier:
            self._choices, self._next = max(earlier, key=lambda known: known[0].shape[1])[1], 0
        else:
            prompts[:] = [known for known in prompts if not torch.equal(known[0], ids)] + [(ids, self._choices)]

    def next(self) -> Selection:
        """The choice that was made at this place before."""
        selection = self._choices[self._next]
        self._next += 1
        return selection

    def note(self, selection: Selection) -> Selection:
        """Keep a choice for later."""
        self._choices.append(selection)
        return selection


def _continues(ids: Tensor, prompt: Tensor) -> bool:
    """Whether a call (batch, length) holds longer prompts than an earlier one, which begin with its."""
    length = prompt.shape[1]
    return len(ids) == len(prompt) and ids.shape[1] > length and torch.equal(ids[:, :length], prompt)
