# SPDX-License-Identifier: Apache-2.0
"""Documents of lmms-eval's tasks to a vision-language model: answers or log-likelihoods, and the task's own scores."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vtprune.errors import ConfigError
from vtprune.eval.config import EvalConfig
from vtprune.eval.inputs import answers
from vtprune.eval.lmms.decoding import MAX_NEW_TOKENS, Generation, score_continuations
from vtprune.eval.lmms.messages import continuation
from vtprune.eval.results.records import Record
from vtprune.eval.running.measure import measure
from vtprune.eval.running.questions import QuestionEvaluator
from vtprune.eval.tasks import Conversation

if TYPE_CHECKING:
    from vtprune.eval.running.runner import Study


class LmmsEvaluator(QuestionEvaluator):
    """A vision-language model and the documents of a task of lmms-eval.

    A batch holds all requests of its documents: one each, or in a multiple choice one for each choice.

    Raises:
        ConfigError: the model does not take the task's media, or its processor would read every frame of a video.
    """

    def __init__(self, config: EvalConfig, study: Study, loaded: tuple[Any, Any]):
        super().__init__(config, study, loaded)
        if self.task.kind == "video" and not self.processor.video_processor.do_sample_frames:
            raise ConfigError(
                f"lmms:{self.task.name}: the processor of {study.model!r} takes every frame of a video; set "
                "do_sample_frames and num_frames (or fps) in its video_preprocessor_config.json"
            )
        given = {} if config.max_new_tokens is None else {"max_new_tokens": config.max_new_tokens}
        self.generation = Generation.of({**self.task.settings, **given}, MAX_NEW_TOKENS)

    def _asked(self, batch: range) -> list[Conversation]:
        documents = [self.examples[i] for i in batch]
        return [document.prompt(request) for document in documents for request in document.requests()]

    def _run_batch(self, batch: range, inputs: Any, session: Any) -> list[Record]:
        asked = {index: self.examples[index].requests() for index in batch}
        if self.task.generates:
            texts, _ = answers(self.model, self.processor, inputs, **self.generation.options)
            replies: list[Any] = [self.generation.cut(text) for text in texts]
        else:
            texts = [text for index in batch for text in self._continuations(index, asked[index])]
            scored = score_continuations(self.model, self.processor, inputs, texts)
            replies = [(one.loss, one.greedy) for one in scored]
        places = [index for index, requests in asked.items() for _ in requests]
        costs: dict[int, Record] = {}
        for index, cost in zip(places, measure(session.report, places), strict=True):
            costs.setdefault(index, cost)  # of one prompt, since all requests of a document show the same media
        for request, reply in zip(itertools.chain(*asked.values()), replies, strict=True):
            request.resps.append(reply)
        scores = []
        for index, requests in asked.items():
            results = self.task.scores.process(self.examples[index].document, requests)
            scores.append({"score": self.task.scores.of_document(results), "results": results})
        predictions = [self._prediction(index, requests) for index, requests in asked.items()]
        return self._records(batch, predictions, list(costs.values()), scores)

    def _continuations(self, index: int, requests: Sequence[Any]) -> list[str]:
        document = self.examples[index].document
        return [continuation(request, document) for request in requests]

    def _prediction(self, index: int, requests: Sequence[Any]) -> str:
        """The answer that the task scores: a text as its first filter left it, or the likeliest of the choices.

        A single continuation is the answer if greedy decoding gives it; else there is none.
        """
        if self.task.generates:
            filtered = next(iter(requests[0].filtered_resps.values()))
            return filtered if isinstance(filtered, str) else requests[0].resps[0]
        texts = [text.strip() for text in self._continuations(index, requests)]
        scored = [request.resps[0] for request in requests]
        if len(texts) == 1:
            return texts[0] if scored[0][1] else ""
        return min(zip(scored, texts, strict=True), key=lambda pair: pair[0][0])[1]
