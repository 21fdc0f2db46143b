# SPDX-License-Identifier: Apache-2.0
"""What callers tell a session about all calls: the question, and where prompts end."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from torch import Tensor

from vtprune.callers import Caller, caller, lives
from vtprune.errors import VTPruneError
from vtprune.stages.question import Text

PromptLength = int | Sequence[int] | Tensor | None


class Guidance:
    """The question and the prompt length of all threads; one thread may change them between calls."""

    def __init__(self, text: Text | None, prompt_length: PromptLength):
        self._text, self._prompt_length = text, prompt_length
        self._lock = threading.Lock()
        self._changed_by: Caller | None = None

    @property
    def text(self) -> Text | None:
        """The question; None: the prompt's own text."""
        return self._text

    @text.setter
    def text(self, text: Text | None) -> None:
        self._note_change()
        self._text = text

    @property
    def prompt_length(self) -> PromptLength:
        """Tokens of each prompt; None: all, or what `labels` or `logits_to_keep` of a call leave."""
        return self._prompt_length

    @prompt_length.setter
    def prompt_length(self, prompt_length: PromptLength) -> None:
        self._note_change()
        self._prompt_length = prompt_length

    def _note_change(self) -> None:
        """Note who changes what all calls share. Raises VTPruneError if another living thread or task does so, too."""
        changing = caller()
        with self._lock:
            if self._changed_by not in (None, changing) and lives(self._changed_by):
                raise VTPruneError(
                    "text and prompt_length are those of all threads and tasks, and another one has changed them: it "
                    "would be guided by yours; leave text out (the prompt's own question is read), or change them in "
                    "one thread only"
                )
            self._changed_by = changing
