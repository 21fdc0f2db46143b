# SPDX-License-Identifier: Apache-2.0
"""Tasks of lmms-eval. Documents, prompts, settings and scores are lmms-eval's own: its task objects are called."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vtprune.config import nearest
from vtprune.errors import ConfigError
from vtprune.eval.lmms.decoding import MAX_NEW_TOKENS
from vtprune.eval.lmms.messages import chat_messages, conversation, simple_messages
from vtprune.eval.tasks.base import Conversation, Kind, Task, example_digest, kinds_of
from vtprune.eval.tasks.lmms_checks import refuse_unscorable
from vtprune.eval.tasks.lmms_scores import Scores, cause_of, silent
from vtprune.eval.tasks.opening import LMMS
from vtprune.eval.tasks.suites import suite_table

_FAMILIES = ("family", "category", "task_type", "question_type", "type", "subject")
"""Fields of documents that say what kind of question it is; the first that there is."""

_LOOKED_AT = 8
"""Number of documents, the first ones, in which a task without answers shows."""

_REHEARSED = 3000
"""Number of documents that are scored within seconds."""


class Document:
    """One document of a task: what it asks, and its requests in lmms-eval's form.

    Args:
        task: task object of lmms-eval.
        index: of the document in the split that is evaluated.
    """

    def __init__(self, task: Any, index: int):
        self._task = task
        self.index = index

    @property
    def document(self) -> Mapping[str, Any]:
        """Without its images, unless the task scores with them; read anew, because tasks may write into it."""
        return self._task.eval_docs_no_media[self.index]

    @property
    def answer(self) -> str:
        """The target; of a multiple choice the text of the right one."""
        document = self.document
        target = self._task.doc_to_target(document)
        if self._task.config.doc_to_choice is not None and isinstance(target, int):
            choices = self._task.doc_to_choice(document)
            return str(choices[target]) if target < len(choices) else str(target)
        return target if isinstance(target, str) else json.dumps(target, ensure_ascii=False, default=str)

    @property
    def question(self) -> str:
        """lmms-eval's text of the prompt, without marks of media; else the texts of its messages."""
        text = self._context
        if isinstance(text, str) and text:
            return text
        return "\n".join(part["text"] for turn in self.conversation() for part in turn["content"] if "text" in part)

    @cached_property
    def family(self) -> str:
        """A field of the document that says what kind of question it is, else the name of the task."""
        document = self.document
        found = (document[key] for key in _FAMILIES if isinstance(document.get(key), str) and document[key])
        return next(found, self._task.task_name)

    @property
    def _context(self) -> Any:
        return self._task.fewshot_context(doc=self.document, num_fewshot=0)

    def requests(self) -> list[Any]:
        """New `Instance`s of the document: one that asks for an answer, or one for each choice."""
        from lmms_eval.api.task import ConfigurableTask

        metadata = {"task": self._task.task_name, "doc_id": self.index, "repeats": 1, "split": _split(self._task)}
        options = {"doc_id": self.index, "ctx": self._context, "metadata": metadata}
        if generates(self._task):
            made = self._task.construct_requests(**options)
        else:  # messages of chat models are for generation only, so these requests are in the form of simple models
            made = ConfigurableTask.construct_requests(self._task, **options)
        return made if isinstance(made, list) else [made]

    def prompt(self, request: Any) -> Conversation:
        """The prompt of one of the requests."""
        messages = chat_messages if generates(self._task) else simple_messages
        try:
            return conversation(messages(request, self._task.eval_docs[self.index]))
        except ConfigError as error:
            raise ConfigError(f"lmms:{self._task.task_name}: document {self.index}: {error}") from error

    def conversation(self) -> Conversation:
        """The prompt of the first request."""
        return self.prompt(self.requests()[0])


@dataclass(frozen=True)
class LmmsTask(Task):
    """A task of lmms-eval."""

    generates: bool = True
    """whether answers are generated, or given continuations are scored"""
    settings: Mapping[str, Any] | None = None
    """`generation_kwargs`"""
    scores: Scores | None = None
    """of its documents and its metrics"""

    @property
    def metrics(self) -> Scores | None:
        return self.scores

    def rehearse(self, examples: Sequence[Document]) -> None:
        """Scores the documents with their own targets as answers, before a model is loaded.

        So a task whose code fails on these documents, as MME's does on half a pair, shows now. Of many documents only
        the first is tried.

        Raises:
            ConfigError: what scores documents or aggregates their scores fails.
        """
        whole = len(examples) <= _REHEARSED
        results = []
        for document in examples if whole else examples[:1]:
            requests = document.requests()
            for place, request in enumerate(requests):
                request.resps.append(document.answer if self.generates else (float(place), place == 0))
            results.append(self.scores.process(document.document, requests))
            self.scores.of_document(results[-1])
        if whole:
            self.scores.aggregated(results)


def generates(task: Any) -> bool:
    """Whether a task object asks for answers, and not for log-likelihoods."""
    return task.OUTPUT_TYPE == "generate_until"


def open_lmms(name: str, include_path: Sequence[Path] = ()) -> list[LmmsTask]:
    """The task of that name, or the tasks of the group or tag of that name.

    Args:
        name: as `lmms_eval --tasks` takes it.
        include_path: folders with further tasks.

    Raises:
        ConfigError: lmms-eval is missing, there is no such task, a task cannot be loaded, or its documents cannot be
            scored here (with the reason).
    """
    if find_spec("lmms_eval") is None:
        raise ConfigError(f'{LMMS}{name} needs lmms-eval: pip install "vtprune[eval]"')
    manager = _manager(tuple(str(folder) for folder in include_path))
    if name not in manager.all_tasks:
        raise ConfigError(f"{LMMS}{name}: lmms-eval has no such task; {nearest(name, manager.all_tasks)}")
    return [_open(manager, leaf) for leaf in _leaves(manager, name)]


@functools.cache
def _manager(include_path: tuple[str, ...]) -> Any:
    from lmms_eval.tasks import TaskManager

    # The name decides which of its prompts a task takes. It is that of `python -m lmms_eval --model vtprune`.
    with silent():
        return TaskManager(include_path=list(include_path), model_name="vtprune")


def _leaves(manager: Any, name: str) -> Iterator[str]:
    """Names of single tasks: the name itself, or those of the group or tag."""
    if manager.task_index[name]["type"] not in ("group", "tag"):
        yield name
        return
    inside = manager.task_index[name]["task"]
    if inside == -1:  # of a group that has a file
        inside = _loaded(name, lambda: manager._get_config(name))["task"]
    for item in inside:
        if not isinstance(item, str):
            raise ConfigError(f"{LMMS}{name}: the group changes its tasks ({item}); name single tasks")
        yield from _leaves(manager, item)


def _open(manager: Any, name: str) -> LmmsTask:
    known = suite_table().get(name, {})
    config = _loaded(name, lambda: manager._get_config(name))
    refuse_unscorable(name, config, known.get("judge"))
    (task,) = _loaded(name, lambda: manager.load_task_or_group(name, task_type="chat")).values()
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    settings, kind = task.config.generation_kwargs or {}, _kind(name, task)
    return LmmsTask(
        name=name,
        entry=f"{LMMS}{name}",
        rules=_rules(name, config),
        digest=_digest(task, kind),
        examples=lambda limit: [Document(task, index) for index in range(len(task.eval_docs))[:limit]],
        score=_scored_by_lmms_eval,
        max_new_tokens=settings.get("max_new_tokens") or MAX_NEW_TOKENS,
        kind=kind,
        generates=generates(task),
        settings=settings,
        scores=Scores(task, known.get("metric")),
    )


def _loaded(name: str, load: Callable[[], Any]) -> Any:
    """What `load` returns; ConfigError for whatever lmms-eval, its tasks and data sets raise."""
    try:
        with silent():
            return load()
    except Exception as error:
        cause = cause_of(error)
        text = (str(cause).strip().splitlines() or [""])[0]
        raise ConfigError(f"{LMMS}{name}: lmms-eval cannot load it: {type(cause).__name__}: {text}") from cause


def _scored_by_lmms_eval(prediction: str, example: Document) -> float:
    raise NotImplementedError("`LmmsTask.scores` scores documents, because metrics need more than the prediction")


def _kind(name: str, task: Any) -> Kind:
    """Kind of the media, from the first documents. Raises ConfigError if they have none, or if answers are hidden."""
    first, *more = [Document(task, index) for index in range(min(_LOOKED_AT, len(task.eval_docs)))]
    if all(task.doc_to_target(one.document) in (None, "", [], "None") for one in (first, *more)):
        raise ConfigError(
            f"{LMMS}{name}: its answers are hidden (the first documents have none); run `python -m lmms_eval --model "
            f"vtprune ... --tasks {name} --predict_only --log_samples --output_path OUT`, which writes the answers"
        )
    kinds = kinds_of(first.conversation())
    if len(kinds) != 1:
        raise ConfigError(f"{LMMS}{name}: expected documents with images or with videos, got {sorted(kinds) or 'text'}")
    return kinds.pop()


def _split(task: Any) -> str:
    return task.config.test_split if task.has_test_docs() else task.config.validation_split


def _rules(name: str, config: Mapping[str, Any]) -> str:
    """Hash of a task's config and of the code beside the functions that it names."""
    sources: set[Path] = set()

    def written(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): written(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [written(item) for item in value]
        if callable(value):
            function = getattr(value, "func", value)  # of a partial
            file = getattr(getattr(function, "__code__", None), "co_filename", None)
            if file and os.path.isfile(file):
                sources.update(Path(file).parent.glob("*.py"))
            return getattr(function, "__qualname__", type(value).__name__)
        return str(value)

    parts = [name, version("lmms-eval"), written(config)]
    parts += [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in sorted(sources)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _digest(task: Any, kind: Kind) -> Callable[[Document], str]:
    """document -> hash of its fields as stored, and of the media of its prompt."""

    # Stored fields mostly have the bytes of pictures, which then need not be decoded. Otherwise the prompt is hashed.
    stored = task.eval_docs.with_format("arrow")
    asks = kind == "video" or "Image(" not in str(task.eval_docs.features)

    def digest(example: Document) -> str:
        hashed = hashlib.sha256()
        for value in stored[example.index].to_pylist():
            _feed(hashed, value)
        if asks:
            hashed.update(example_digest(example).encode())
        return hashed.hexdigest()[:16]

    return digest


def _feed(hashed: Any, value: Any) -> None:
    if isinstance(value, bytes):
        hashed.update(f"bytes {len(value)} ".encode() + value)
    elif isinstance(value, dict):
        for key in sorted(value):
            hashed.update(f"key {key!r} ".encode())
            _feed(hashed, value[key])
    elif isinstance(value, list):
        hashed.update(f"list {len(value)} ".encode())
        for item in value:
            _feed(hashed, item)
    else:
        hashed.update(f"{value!r} ".encode())
