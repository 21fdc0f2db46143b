# SPDX-License-Identifier: Apache-2.0
"""Where vLLM encodes images and videos: the plan of each is carried out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtprune.adapters import Adapter
from vtprune.adapters.base import PIXELS
from vtprune.serving.plan import Plan, adapter_of, media_of
from vtprune.serving.selection import choose_tokens
from vtprune.serving.setting import method_of
from vtprune.serving.vllm.fields import KINDS, field
from vtprune.serving.vllm.tap import recorded, reshape
from vtprune.stages.encoder import EncoderRecorder
from vtprune.stages.encoder_call import EncoderCall

if TYPE_CHECKING:
    from vllm.model_executor.models.interfaces import SupportsMultiModal as Base
else:
    Base = object


class PrunesEmbeddings(Base):
    """Mixin in front of a multimodal model class of vLLM."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        self._vtprune_config = config
        self._vtprune_width = config.get_text_config().hidden_size
        self._vtprune_tokens = vllm_config.scheduler_config.max_num_batched_tokens

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """One tensor (tokens left, dim) an image or video."""
        packed = {kind: kwargs.pop(field(kind), None) for kind in KINDS}
        kinds = [kind for kind, plans in packed.items() if plans is not None]
        if not kinds:
            return super().embed_multimodal(**kwargs)
        (kind,) = kinds  # vLLM encodes one kind at a time
        plans = [Plan.unpack(plan) for plan in packed[kind]]
        adapter = adapter_of(self._vtprune_config)
        left: list[Tensor] = []
        # vLLM encodes videos of different lengths of LLaVA-OneVision at once, and then finds their tokens in no shape
        # that it knows, so each of these is encoded alone.
        unlike = kind == "video" and isinstance(kwargs[PIXELS[kind]], list)
        totals = [plan.total for plan in plans]
        for part in slices(totals, 0 if unlike else self._vtprune_tokens):
            inputs = kwargs if len(part) == len(plans) else sliced(adapter, kind, kwargs, part, len(plans))
            left += self._encode(kind, inputs, plans[part.start : part.stop], adapter)
        return left

    def _encode(self, kind: str, inputs: Mapping[str, Any], plans: Sequence[Plan], adapter: Adapter) -> list[Tensor]:
        methods = [method_of(plan.method, adapter) for plan in plans]
        requests = {signal for method in methods for signal in method.signals(adapter.shape)}
        recorder = EncoderRecorder(adapter, requests, profile=False)
        encoding = EncoderCall(kind, inputs)
        with recorded(self, recorder, encoding):
            outputs = super().embed_multimodal(**inputs)
        encoding.media = media_of(adapter, kind, inputs, [len(output) for output in outputs])
        reshape(encoding, adapter)
        return [
            choose_tokens(method, plan, output, self._vtprune_width, recorder, encoding, index, self._vtprune_embed)
            if plan.prunes
            else output
            for index, (method, plan, output) in enumerate(zip(methods, plans, outputs, strict=True))
        ]

    def _vtprune_embed(self, ids: Tensor) -> Tensor:
        language_model = self.get_language_model()
        return language_model.embed_input_ids(ids.to(next(language_model.parameters()).device))


def slices(totals: Sequence[int], limit: int) -> list[range]:
    """Runs of media of at most `limit` tokens each, or of one larger medium.

    vLLM counts the tokens that are left of media, so that it hands over more of them at once than it has memory for.
    """
    runs, start, held = [], 0, 0
    for index, total in enumerate(totals):
        if held and held + total > limit:
            runs.append(range(start, index))
            start, held = index, 0
        held += total
    return [*runs, range(start, len(totals))]


def sliced(adapter: Adapter, kind: str, inputs: Mapping[str, Any], part: range, count: int) -> dict[str, Any]:
    """The arguments of a call for some of its `count` media."""
    name = PIXELS[kind]
    pixels = inputs[name]
    if len(pixels) == count:
        lengths = [1] * count
    elif f"{kind}_num_patches" in inputs:
        lengths = torch.as_tensor(inputs[f"{kind}_num_patches"]).flatten().tolist()
    else:
        lengths = [len(own) for own in adapter.pixels(kind, inputs)]
    first, last = sum(lengths[: part.start]), sum(lengths[: part.stop])
    own = pixels[first:last]
    cut = {name: own[0][None] if kind == "video" and isinstance(own, list) else own}
    for other, value in inputs.items():
        if other != name:
            # What does not have one entry a medium is the same for all of them.
            many = isinstance(value, list | tuple) or (torch.is_tensor(value) and value.ndim > 0)
            cut[other] = value[part.start : part.stop] if many and len(value) == count else value
    return cut
