# SPDX-License-Identifier: Apache-2.0
"""A server under load: every answer is that of the same request alone, and bad requests harm nobody."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vtprune.testing.media import IMAGE, VIDEO

from .checkpoints import save
from .server import server
from .serving import VIDEOS, A, Answer, B, C, D, Reference, Request, clip

pytestmark = pytest.mark.slow

NAME = "qwen2_5_vl"
DEFAULT_METHOD = {"name": "divprune", "keep_ratio": 0.5}
CAP = 0.8
METHODS = [{"name": name, "keep_ratio": ratio} for name in ("divprune", "mmtok", "pool") for ratio in (0.25, 0.5)]
CLIENTS = 16
LIMITS = json.dumps({"image": 4, "video": VIDEOS})
LONG = 32
"""Tokens of an answer that goes on while something is looked up."""
TIE = 1e-3
"""Two tokens whose log-probabilities are nearer than that may change places by rounding."""
BAD = [
    ({"name": "nosuch", "keep_ratio": 0.5}, "nosuch"),
    ({"name": "fastv", "keep_ratio": 0.5}, "before the LLM"),
    ({"name": "divprune"}, "budget"),
    ({"name": "divprune", "keep_tokens": 0}, "no place"),
    ({"name": "divprune", "keep_tokens": 5000}, "5000"),
    ({"name": "divprune", "keep_ratio": 0.9}, "at most"),
    ({"name": "divprune", "keep_ratio": 0.5, "positions": "original"}, "compact"),
    ({"name": "divprune", "keep_ratio": 0.5, "max_keep_ratio": 1.0}, "operator"),
    ({"name": "visionzip", "keep_ratio": 0.5}, "visionzip"),
    (None, "at most"),
]


def texts() -> list[Request]:
    """Requests that all differ: three sizes of images, videos, several of them in a prompt, and text alone."""
    asked = []
    for method in METHODS:
        for image in (A, B, D):
            asked += [
                Request(f"look : {{image}} {text}", [image], method) for text in ("who is this ?", "what is this ?")
            ]
        asked += [
            Request("compare {image} and {image} which one is bigger ?", [B, C], method),
            Request("look : {video} what is this ?", method=method, videos=[clip(8)]),
            Request("{image} and {video} who is this ?", [A], method, videos=[clip(4, 30, 60)]),
        ]
    asked += [Request("look : {image} who is this ?", [A]), Request("{image} and {image} who are you ?", [C, C])]
    return [*asked, Request("who are you ?"), Request("what is the original picture ?")]


@pytest.fixture(scope="module")
def path(folder):
    return save(NAME, folder)


@pytest.fixture(scope="module")
def expected(path):
    """Requests, and what transformers with vtprune answers."""
    reference = Reference(path)
    return [(request, reference.answer(request, DEFAULT_METHOD)) for request in texts()]


@pytest.fixture(scope="module")
def served(path, tmp_path_factory):
    setting = json.dumps({"vtprune": DEFAULT_METHOD | {"max_keep_ratio": CAP}})
    options = ["--hf-overrides", setting, "--trust-request-mm-kwargs", "--limit-mm-per-prompt", LIMITS]
    with server(path, *options, log=tmp_path_factory.mktemp("server") / "log") as found:
        yield found


def comparable(answer: Answer) -> int:
    """How many tokens come before the first near-tie."""
    best = answer.logprobs.topk(2).values
    near = (best[:, 0] - best[:, 1] < TIE).nonzero().flatten().tolist()
    return near[0] if near else len(answer.tokens)


def check(answer: Answer, choice: dict) -> int:
    """Compare a choice with what is expected; returns how many tokens were compared."""
    steps = comparable(answer)
    assert choice["token_ids"][:steps] == answer.tokens[:steps]
    given = torch.tensor([entry["logprob"] for entry in choice["logprobs"]["content"][:steps]])
    wanted = answer.logprobs[torch.arange(steps), answer.tokens[:steps]]
    assert steps == 0 or float((given - wanted).abs().max()) < 1e-3
    return steps


def test_mixed_requests_of_many_clients(served, path, expected):
    before = served.metrics()
    assert not [name for name in before if name.startswith("vtprune:tokens") and before[name]]  # profiling counts not
    draw = random.Random(0)
    asked = [draw.choice(expected) for _ in range(200)]
    bad = [Request("look : {image} who is this ?", [A], method) for method, _ in BAD]
    places = draw.sample(range(200), len(BAD))
    with ThreadPoolExecutor(CLIENTS) as clients:
        refusals, answers, memory = [], [], 0
        for index, (request, _) in enumerate(asked):
            answers.append(clients.submit(served.chat, request))
            if index in places:
                refusals.append(clients.submit(served.refusal, bad[places.index(index)]))
            if index == 99:
                answers[-1].result()
                memory = served.memory()
        given = [answer.result() for answer in answers]
        compared = [check(answer, own["choices"][0]) for (_, answer), own in zip(asked, given, strict=True)]
        assert sum(compared) > 0.95 * sum(len(answer.tokens) for _, answer in asked)  # near-ties are rare
        found = {refusal.result() for refusal in refusals}
    assert [status for status, _ in found] == [400] * len(found)
    for _, message in BAD:
        assert any(message in text for _, text in found), (message, found)
    assert served.memory() - memory < 64 << 20
    check_counters(served, path, [request for request, _ in asked], given)


def check_counters(served, path, requests, answers):
    """What `/metrics` says is what the images have, and what the prompts do not."""
    reference = Reference(path)
    seen = dropped = 0
    for request, answer in zip(requests, answers, strict=True):
        if request.visual:
            ids = reference.inputs(request)["input_ids"][0].tolist()
            seen += ids.count(IMAGE) + ids.count(VIDEO)
            dropped += len(ids) - answer["usage"]["prompt_tokens"]
    found = {name: served.metric(f"vtprune:tokens_{name}_total") for name in ("seen", "kept", "dropped")}
    assert found == {"seen": seen, "kept": seen - dropped, "dropped": dropped}
    methods = {DEFAULT_METHOD["name"], *(method["name"] for method in METHODS)}
    for method in methods:
        assert served.metrics()[f'vtprune:tokens_dropped_total{{method="{method}"}}'] > 0


def test_parts_of_a_stream_are_the_answer(served, expected):
    for request, answer in expected[:8]:
        parts = [part["choices"][0] for part in served.stream(request) if part["choices"]]
        whole = [token for part in parts for token in part.get("token_ids") or []]
        steps = comparable(answer)
        assert len(parts) > 2 and whole[:steps] == answer.tokens[:steps]


def test_several_answers_to_a_request_are_those_of_its_seeds(served):
    request = Request("look : {image} who is this ?", [A], METHODS[0])
    both = served.chat(request, n=2, temperature=1.0, seed=5)["choices"]
    alone = [served.chat(request, temperature=1.0, seed=seed)["choices"][0] for seed in (5, 6)]
    assert [choice["token_ids"] for choice in both] == [choice["token_ids"] for choice in alone]
    assert both[0]["token_ids"] != both[1]["token_ids"]


def test_a_clients_name_of_an_image_is_not_that_of_its_plan(served, expected):
    for request, answer in (pair for pair in expected if pair[0].images and pair[0].images[0] is D):
        check(answer, served.chat(dataclasses.replace(request, more={"uuids": ["mine"]}))["choices"][0])


def test_a_request_takes_the_blocks_of_the_tokens_that_are_left(served):
    """Its prompt and its answer, in blocks of 32 tokens."""
    taken = []
    for ratio in (0.75, 0.25):
        method = {"name": "divprune", "keep_ratio": ratio}
        parts = served.stream(Request("{image} {image} {image} {image} who is this ?", [D] * 4, method), LONG)
        first = next(parts)
        used = served.metric("vllm:kv_cache_usage_perc") * served.cache()[0]
        (usage,) = [part["usage"] for part in (first, *parts) if part.get("usage")]
        prompt = usage["prompt_tokens"]
        assert abs(used - round(used)) < 1e-3
        assert math.ceil(prompt / 32) <= round(used) <= math.ceil((prompt + LONG) / 32)
        taken.append((prompt, round(used)))
    (full, of_full), (pruned, of_pruned) = taken
    assert (full - pruned) // 32 - 1 <= of_full - of_pruned <= (full - pruned) // 32 + 2 and of_pruned < of_full
