# SPDX-License-Identifier: Apache-2.0
"""Before a request reaches the engine: fewer placeholders, and the plan of each image or video beside its pixels."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldConfig
from vllm.multimodal.processing import PromptUpdateDetails

from vtprune.adapters import Adapter
from vtprune.errors import UnsupportedStageError, VTPruneError
from vtprune.serving.plan import Plan, adapter_of, media_of, tokens_left
from vtprune.serving.setting import KEY, UNSET, ServerSetting, Spec, method_of
from vtprune.serving.signals import draws, prompt_key, questions, reads_text
from vtprune.serving.vllm.fields import KINDS, field
from vtprune.serving.vllm.limits import check
from vtprune.serving.vllm.metrics import count

if TYPE_CHECKING:
    from vllm.multimodal.processing import BaseMultiModalProcessor as Base
else:
    Base = object


@dataclasses.dataclass(frozen=True)
class _Request:
    """What a request asks for. On the way through vLLM's methods it is in the processor's arguments under `KEY`; each
    method takes it out before vLLM's own is called, for transformers' processor knows nothing of it."""

    spec: Spec
    texts: Mapping[str, list[tuple[int, ...]]] | None = None
    """Kind -> the question to each medium; None if the method reads none."""
    prompt_key: int = 0

    def own(self, kind: str, index: int) -> dict[str, Any]:
        """What of it concerns one medium."""
        text = None if self.texts is None else self.texts[kind][index]
        return {"method": dict(self.spec), "text": text, "prompt_key": self.prompt_key}

    def without(self, cached: Mapping[str, list[bool]]) -> _Request:
        """The same for the media that no cache holds, which vLLM numbers anew."""
        if self.texts is None:
            return self
        texts = {
            kind: [text for text, held in zip(texts, cached[kind], strict=True) if not held]
            for kind, texts in self.texts.items()
        }
        return dataclasses.replace(self, texts=texts)


@dataclasses.dataclass
class _Shortened(PromptUpdateDetails):
    """The text of a medium that lost tokens. vLLM's cache keeps it, where it keeps no plan."""

    total: int = 0
    kept: int = 0


class PrunesPlaceholders(Base):
    """Mixin in front of a multimodal processor of vLLM. Refusals are raised here, as a request comes in: an error
    where images are encoded would end the engine."""

    def __init__(self, info: Any, dummy_inputs: Any, **options: Any):
        super().__init__(info, dummy_inputs, **options)
        self._profiling = threading.local()
        config = info.get_hf_config()
        self._server = ServerSetting.of(getattr(config, KEY, None))
        if self._server.default is not None:  # an operator is told when the server starts
            method_of(self._server.default, adapter_of(config))

    # -- what is asked for --------------------------------------------------------------------------------------

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        # Memory is measured with these, and the encoder sees all tokens.
        self._profiling.on = True
        try:
            return super().get_dummy_mm_inputs(*args, **kwargs)
        finally:
            self._profiling.on = False

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        kwargs = dict(inputs.hf_processor_mm_kwargs)
        asked = kwargs.pop(KEY, UNSET)
        try:
            if any(inputs.mm_data_items.get_all_counts().values()) and not getattr(self._profiling, "on", False):
                spec = self._server.asked(asked)
                if spec is not None:
                    kwargs[KEY] = self._request(spec, inputs)
            return super().apply(dataclasses.replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx)
        except VTPruneError as error:
            # Any other class would be an error of the server.
            raise VLLMValidationError(str(error), parameter=KEY) from error

    def _request(self, spec: Spec, inputs: Any) -> _Request:
        check(self.info.get_hf_config())
        adapter = self._adapter
        method = method_of(spec, adapter)
        counts = {kind: len(items) for kind, items in inputs.mm_data_items.items()}
        if others := sorted(kind for kind, count in counts.items() if count and kind not in adapter.visual_token_ids):
            raise UnsupportedStageError(f"{', '.join(others)} beside pruned images or videos is not built")
        texts = None
        if reads_text(method, adapter):
            found = {kind: questions(inputs.prompt, kind, count, adapter) for kind, count in counts.items()}
            texts = {kind: [tuple(text) for text in of_kind] for kind, of_kind in found.items()}
        return _Request(spec, texts, prompt_key(inputs.prompt, adapter) if draws(method, adapter) else 0)

    @property
    def _adapter(self) -> Adapter:
        return adapter_of(self.info.get_hf_config())

    # -- what vLLM's caches know a medium by --------------------------------------------------------------------

    def _get_mm_hashes(self, inputs: Any) -> Any:
        kwargs, request = _taken(inputs.hf_processor_mm_kwargs)
        hashes = super()._get_mm_hashes(dataclasses.replace(inputs, hf_processor_mm_kwargs=kwargs))
        if request is None:
            return hashes
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        return {
            kind: [
                MultiModalHasher.hash_kwargs(algorithm, item=known, vtprune=request.own(kind, index))
                for index, known in enumerate(items)
            ]
            for kind, items in hashes.items()
        }

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Any:
        kwargs, request = _taken(super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached))
        return kwargs if request is None else kwargs | {KEY: request.without(mm_is_cached)}

    # -- what is counted ----------------------------------------------------------------------------------------

    def _cached_apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        result = super()._cached_apply_hf_processor(inputs, timing_ctx)
        _, request = _taken(inputs.hf_processor_mm_kwargs)
        if request is not None:
            for items in result.prompt_updates.values():
                for content in (alternatives[0].content for alternatives in items):
                    if isinstance(content, _Shortened):
                        count(request.spec["name"], content.total, content.kept)
                    else:
                        count(request.spec["name"], total := len(_places(content)), total)
        return result

    # -- around transformers' processor -------------------------------------------------------------------------

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Any) -> Any:
        kwargs, request = _taken(hf_kwargs)
        processed = super()._apply_hf_processor_main(mm_items, kwargs)
        if request is not None:
            for kind, items in mm_items.items():
                if len(items):  # the plans follow when vLLM has cut the output into media
                    processed[field(kind)] = [torch.zeros(1, dtype=torch.uint8) for _ in range(len(items))]
        return processed

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
        kwargs, _ = _taken(hf_processor_mm_kwargs)
        config = dict(super()._get_mm_fields_config(hf_inputs, kwargs))
        for kind in KINDS:
            if field(kind) in hf_inputs:
                config[field(kind)] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
        return config

    def _get_mm_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        kwargs, request = _taken(hf_processor_mm_kwargs)
        updates = super()._get_mm_prompt_updates(mm_items, kwargs, out_mm_kwargs)
        if request is None:
            return updates
        adapter = self._adapter
        method = method_of(request.spec, adapter)
        pruned: dict[str, list[Any]] = {}
        for kind, items in updates.items():
            pruned[kind] = []
            for index, alternatives in enumerate(items):
                item = out_mm_kwargs[kind][index]
                total = len(_places(alternatives[0].content))
                (medium,) = media_of(
                    adapter, kind, {name: _of_batch(element) for name, element in item.items()}, [total]
                )
                kept = tokens_left(medium, method, self._server.max_keep_ratio)
                within = _within(alternatives[0].content) if kept < total else ()
                plan = Plan(kept=kept, total=total, within=within, **request.own(kind, index))
                item[field(kind)].data = plan.pack()
                if plan.prunes:
                    alternatives = [dataclasses.replace(u, content=_shortened(u.content, plan)) for u in alternatives]
                pruned[kind].append(alternatives)
        return pruned


def _taken(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], _Request | None]:
    """Arguments for transformers' processor, and what was asked for among them."""
    rest = dict(kwargs)
    return rest, rest.pop(KEY, None)


def _of_batch(element: Any) -> Any:
    """A field of one medium as it is in a batch of one."""
    data = element.data
    return data[None] if isinstance(element.field, MultiModalBatchedField) and torch.is_tensor(data) else data


def _places(content: PromptUpdateDetails) -> list[int]:
    """Where in a medium's text the visual tokens stand."""
    if content.is_embed is None:
        return list(range(len(content.full)))
    return content.is_embed(content.full).nonzero()[:, 0].tolist()


def _within(content: PromptUpdateDetails) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """`Plan.within` of a medium's text."""
    places = _places(content)
    return tuple(
        (number, tuple(content.full[place + 1 : following]))
        for number, (place, following) in enumerate(itertools.pairwise(places), 1)
        if following > place + 1
    )


def _shortened(content: PromptUpdateDetails, plan: Plan) -> _Shortened:
    """The same text with room for what is left, the text between visual tokens included."""
    places = _places(content)
    first, last = places[0], places[-1]
    room = [content.full[first]] * plan.kept + [token for _, ids in plan.within for token in ids]
    full = [*content.full[:first], *room, *content.full[last + 1 :]]
    embedded: Tensor = torch.zeros(len(full), dtype=torch.bool)
    embedded[first : first + len(room)] = True
    return _Shortened(full, lambda _: embedded, plan.total, plan.kept)
