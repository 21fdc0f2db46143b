# SPDX-License-Identifier: Apache-2.0
"""Models of lmms-eval whose visual tokens are pruned.

Prompts, padding and generation are those of `vtprune eval` (`vtprune.eval.inputs`), so both ways give the same answers.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import traceback
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.utils import eval_logger, simple_parse_args_string
from tqdm import tqdm

import vtprune
from vtprune.errors import ConfigError, VTPruneError
from vtprune.eval.inputs import answers, conversation_inputs, load_model
from vtprune.eval.lmms.arguments import Arguments
from vtprune.eval.lmms.decoding import Generation, lengths, score_continuations
from vtprune.eval.lmms.messages import chat_messages, continuation, conversation, simple_messages
from vtprune.eval.lmms.usage import Usage, UsageLog


@contextmanager
def _failures_end_the_command() -> Iterator[None]:
    """Exits with an error if something fails, because lmms-eval's command catches every exception and exits with 0.

    If lmms-eval is called from Python, exceptions are not changed.
    """
    try:
        yield
    except Exception as error:
        if "lmms_eval.__main__" not in sys.modules:
            raise
        if isinstance(error, VTPruneError):
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from error
        traceback.print_exc()
        raise SystemExit(1) from error


@functools.cache
def _end_where_lmms_eval_fails() -> None:
    """Exits with 1 if lmms-eval logs that an evaluation failed (a missing data set, a metric); it would exit with 0."""

    def end(message: str) -> None:
        raise SystemExit(1)

    def stops(record: dict[str, Any]) -> bool:
        return record["name"] == "lmms_eval.__main__" and record["message"].startswith("Error during evaluation")

    eval_logger.add(end, level="ERROR", filter=stops, catch=False)


class VTPrune(lmms):
    """A model and the methods that prune it. The classes below say how requests state their prompts.

    Args:
        arguments: fields of `Arguments`.

    Raises:
        VTPruneError: the model, the method or an argument cannot be used.
    """

    def __init__(self, **arguments: Any):
        super().__init__()
        self.arguments = Arguments.of(arguments)
        self.methods = self.arguments.methods()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if self._world_size != asked:
            raise ConfigError(
                f"{asked} processes were started, but accelerate sees one; on CPU set ACCELERATE_USE_CPU=1"
            )
        self._load()
        with vtprune.prune(self.model, self.methods, strict=False):
            pass  # shows before any data is loaded whether the model supports the methods

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> VTPrune:
        """From `--model_args`, and from `--batch_size` and `--device` if `--model_args` does not have them."""
        _end_where_lmms_eval_fails()
        with _failures_end_the_command():
            besides = {key: value for key, value in (additional_config or {}).items() if value is not None}
            return cls(**besides | simple_parse_args_string(arg_string))

    def _load(self) -> None:
        wanted = self.arguments
        device = wanted.device
        if device is None or device == self.accelerator.device.type:
            device = str(self.accelerator.device)  # each process has a device of its own
        self.model, self.processor = load_model(wanted.pretrained, wanted.dtype, wanted.attention, device)

    def clean(self) -> None:
        """Frees the model, because a judge may need the memory. It is loaded again if another evaluation follows."""
        super().clean()

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers in the order of `requests`, each with its cost."""
        results = [GenerationResult("")] * len(requests)
        with _failures_end_the_command():
            log = UsageLog(self.methods)
            for places in _alike(requests, lambda request: json.dumps(_settings(request), sort_keys=True, default=str)):
                generation = Generation.of(_settings(requests[places[0]]), self.arguments.max_new_tokens)

                def answer(batch: Sequence[Instance], inputs: Any, generation: Generation = generation) -> Done:
                    texts, new = answers(self.model, self.processor, inputs, **generation.options)
                    return list(map(generation.cut, texts)), lengths(new, self.model)

                for place, text, usage in self._run(requests, places, answer, log):
                    results[place] = GenerationResult(text, usage)
            log.close()
        return results

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """(mean negative log-likelihood of a token, whether greedy decoding gives the same) of each continuation.

        The sign is that of lmms-eval, whose multiple choice takes the smallest value. The pair stands in place of an
        answer's text, because lmms-eval 0.7.3 turns a bare pair into a string, which it then cannot score.
        """

        def score(batch: Sequence[Instance], inputs: Any) -> Done:
            scored = score_continuations(self.model, self.processor, inputs, [*map(self._continuation, batch)])
            return scored, [one.tokens for one in scored]

        results = [GenerationResult((0.0, False))] * len(requests)
        with _failures_end_the_command():
            log = UsageLog(self.methods)
            for places in _alike(requests, lambda request: ""):
                for place, scored, usage in self._run(requests, places, score, log):
                    results[place] = GenerationResult((scored.loss, scored.greedy), usage)
            log.close()
        return results

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raises ConfigError: questions that depend on earlier answers are not supported."""
        with _failures_end_the_command():
            raise ConfigError(f"{requests[0].task_name}: tasks of several rounds are not supported")

    def _run(
        self, requests: Sequence[Instance], places: Sequence[int], work: Callable[..., Done], log: UsageLog
    ) -> Iterator[tuple[int, Any, Usage]]:
        """Runs the requests at `places` in batches: (place, result of `work`, cost) of each request."""
        if not hasattr(self, "model"):
            self._load()
        size = self.arguments.batch_size
        with vtprune.prune(self.model, self.methods, strict=False) as session:
            name = requests[places[0]].task_name
            for start in tqdm(range(0, len(places), size), desc=name, disable=self.rank != 0):
                batch_places = places[start : start + size]
                batch = [requests[place] for place in batch_places]
                inputs = self._inputs([conversation(self._messages(request)) for request in batch])
                started = time.perf_counter()
                results, new = work(batch, inputs)
                seconds = time.perf_counter() - started
                usages = log.add(session.report, [request.doc_id for request in batch], new, seconds)
                yield from zip(batch_places, results, usages, strict=True)

    def _inputs(self, conversations: list[list[dict]]) -> Any:
        shown = {part["type"] for turns in conversations for turn in turns for part in turn["content"]}
        options = self.arguments.processor_kwargs
        if "video" in shown:
            options = self.arguments.frames | options
            sampling = getattr(self.processor, "video_processor", None)
            if sampling is None:
                raise ConfigError(f"the task shows videos, which {type(self.processor).__name__} does not take")
            if not options and not sampling.do_sample_frames:
                raise ConfigError("this processor takes every frame of a video; give num_frames= or fps=")
        return conversation_inputs(self.processor, conversations, **options)

    @abstractmethod
    def _messages(self, request: Instance) -> list[dict]:
        """The conversation of a request, in lmms-eval's form."""

    def _continuation(self, request: Instance) -> str:
        return continuation(request, self._document(request))

    def _document(self, request: Instance) -> Any:
        doc_id, task, split = request.args[-3:]
        return self.task_dict[task][split][doc_id]


class VTPruneChat(VTPrune):
    """For tasks that ask for answers, which are nearly all tasks."""

    is_simple = False

    def _messages(self, request: Instance) -> list[dict]:
        return chat_messages(request, self._document(request))


class VTPruneSimple(VTPrune):
    """For `--force_simple`: lmms-eval then also asks for log-likelihoods."""

    is_simple = True

    def _messages(self, request: Instance) -> list[dict]:
        return simple_messages(request, self._document(request))


Done = tuple[list, list[int]]
"""The result of each request of a batch, and the number of tokens that were generated for it."""


def _alike(requests: Sequence[Instance], settings: Callable[[Instance], Hashable]) -> Iterator[list[int]]:
    """Places of the requests that may share batches: those of one task with equal settings, in their order.

    lmms-eval adds requests so that all processes have equally many. These are left out.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, request in enumerate(requests):
        if not request.metadata.get("__padding_only__"):
            groups.setdefault((request.task_name, settings(request)), []).append(place)
    yield from groups.values()


def _settings(request: Instance) -> dict[str, Any]:
    """The generation settings of a request; simple models have them in another place."""
    return next(argument for argument in request.args if isinstance(argument, dict))
