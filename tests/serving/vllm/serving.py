# SPDX-License-Identifier: Apache-2.0
"""The same requests to vLLM with the plug-in, and to transformers with vtprune: greedy tokens and all logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from vtprune.testing.media import VOCABULARY

from .checkpoints import CHECKPOINTS

STEPS = 8
VIDEOS = {"count": 2, "num_frames": 8, "width": 48, "height": 48}
"""What memory is measured with."""
DEFAULT = object()
"""A request that says nothing of pruning."""


def picture(width: int, height: int, number: int = 0) -> Image.Image:
    pixels = np.random.default_rng([width, height, number]).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def clip(frames: int, width: int = 48, height: int = 40) -> np.ndarray:
    """(frames, height, width, 3) uint8: a video, two frames a second."""
    return np.stack([np.asarray(picture(width, height, number)) for number in range(frames)])


def _metadata(video: np.ndarray) -> dict[str, Any]:
    frames = len(video)
    return {"fps": 2.0, "total_num_frames": frames, "frames_indices": list(range(frames)), "duration": frames / 2}


A, B, C, D = picture(50, 31), picture(23, 60), picture(41, 41), picture(90, 52)


@dataclass(frozen=True)
class Request:
    text: str
    """With {image} where an image stands, and {video} where a video does."""
    images: Sequence[Image.Image] = ()
    method: Any = DEFAULT
    """What it asks for; None for no pruning."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of vLLM's prompt."""
    videos: Sequence[np.ndarray] = ()

    def written(self, name: str) -> str:
        """Its text with the placeholders of a family."""
        checkpoint = CHECKPOINTS[name]
        return self.text.format(image=checkpoint.image, video=checkpoint.video)

    @property
    def visual(self) -> bool:
        return bool(len(self.images) or len(self.videos))


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logprobs: Tensor
    """(steps, vocabulary)."""
    cached: int = 0
    """Tokens of the prompt that came from the prefix cache."""
    prompt: int = 0
    """Tokens of the prompt."""


class Reference:
    """transformers with vtprune, one request at a time."""

    def __init__(self, path: Path):
        self.name = path.name
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(path)

    def inputs(self, request: Request) -> Any:
        """What transformers' processor makes of it."""
        media: dict[str, Any] = {}
        if request.images:
            media["images"] = list(request.images)
        if request.videos:
            media["videos"] = list(request.videos)
            if CHECKPOINTS[self.name].times:
                media["video_metadata"] = [_metadata(video) for video in request.videos]
                media["do_sample_frames"] = False
        return self.processor(text=request.written(self.name), return_tensors="pt", **media)

    @torch.no_grad()
    def answer(self, request: Request, default: Mapping[str, Any] | None = None) -> Answer:
        method = default if request.method is DEFAULT else request.method
        inputs = self.inputs(request)
        prunes = method is not None and request.visual
        with vtprune.prune(self.model, method) if prunes else nullcontext():
            output = self.model.generate(
                **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        logprobs = torch.stack([logits[0].float().log_softmax(-1) for logits in output.logits])
        return Answer(output.sequences[0, inputs["input_ids"].shape[1] :].tolist(), logprobs)


@contextmanager
def engine(path: Path, **options: Any) -> Iterator[Any]:
    """vLLM, its engine in a process of its own."""
    from vllm import LLM

    settings = dict(
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        seed=0,
        block_size=32,
        limit_mm_per_prompt={"image": 4} | ({"video": VIDEOS} if CHECKPOINTS[path.name].video else {}),
        max_num_seqs=8,
        max_logprobs=-1,
        enable_prefix_caching=True,
    )
    llm = LLM(str(path), **settings | options)
    yield llm
    llm.llm_engine.engine_core.shutdown()


def serve(llm: Any, name: str, requests: Sequence[Request]) -> list[Answer]:
    """All requests in one batch."""
    from vllm import SamplingParams

    prompts = []
    for request in requests:
        prompt: dict[str, Any] = {"prompt": request.written(name), **request.more}
        if request.visual:
            videos = [
                (video, _metadata(video) | {"do_sample_frames": False}) if CHECKPOINTS[name].times else video
                for video in request.videos
            ]
            media = {"image": list(request.images), "video": videos}
            prompt["multi_modal_data"] = {kind: items for kind, items in media.items() if items}
        if request.method is not DEFAULT:
            prompt["mm_processor_kwargs"] = {"vtprune": request.method}
        prompts.append(prompt)
    params = SamplingParams(temperature=0, max_tokens=STEPS, logprobs=-1, ignore_eos=True)
    answers = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        logprobs = [[step[token].logprob for token in range(VOCABULARY)] for step in output.outputs[0].logprobs]
        answers.append(
            Answer(
                list(output.outputs[0].token_ids),
                torch.tensor(logprobs),
                output.num_cached_tokens,
                len(output.prompt_token_ids),
            )
        )
    return answers


def assert_equal(expected: Answer, given: Answer) -> None:
    """The same tokens, and log-probabilities of the whole vocabulary that differ by rounding alone."""
    assert given.tokens == expected.tokens
    assert float((given.logprobs - expected.logprobs).abs().max()) < 1e-3
