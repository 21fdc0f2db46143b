# SPDX-License-Identifier: Apache-2.0
"""What a processor puts around and inside images and videos is no question: methods that read text read text alone."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import vtprune
from vtprune.methods.dart import KeyNorms, NormedStates
from vtprune.signals import TextEmbeddings
from vtprune.testing import families
from vtprune.testing.media import IMAGE, VIDEO

from . import processors

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # PaliGemma's processor with NumPy 2

_STAMPED = "qwen3_vl"
FURTHER = {
    "qwen3_vl, stamps of two digits": processors.Case(
        _STAMPED,
        (
            processors.Request("{image} look : {video} what happens ?", ((50, 31),), ((60, 33, 24),)),
            processors.Request("look : {image} what happens ?", ((50, 31),)),
        ),
        fps=4.0,
    ),
    "qwen3_vl, one stamp, as chat templates have it": processors.Case(
        _STAMPED,
        (
            processors.Request(
                "{image} look : <|vision_start|>{video}<|vision_end|> what happens ?", ((50, 31),), ((2, 33, 24),)
            ),
            processors.Request("look : {image} what happens ?", ((50, 31),)),
        ),
        options={"do_sample_frames": False},
    ),
}
CASES = processors.CASES | FURTHER
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)

SEEN: list = []


class Questions(vtprune.BeforeLLM):
    """Notes the question of every image, as mmtok, cdpruner and recoverable read it."""

    name, signal = "questions", "text"

    def signals(self, shape):
        return (TextEmbeddings(),)

    def select(self, tokens):
        SEEN.extend(tokens[TextEmbeddings()])
        return vtprune.Selection.of_indices(tokens, [torch.arange(k) for _, _, k in tokens.each()])


class TextInside(vtprune.InLLM):
    """Notes the states of the text that guides, which is chosen as for sparsevlm, transprune and dart."""

    name, signal, needs_budget = "text_inside", "text", False

    def cuts(self, shape):
        return (1,)

    def budgets(self, shape, entering, images):
        return entering[None] // 2

    def signals(self, shape):
        return (NormedStates(), KeyNorms())

    def select(self, tokens):
        real = tokens[KeyNorms()][1] >= 0
        SEEN.extend(states[own] for states, own in zip(tokens[NormedStates()][1], real, strict=True))
        return vtprune.Selection.of_indices(tokens, [torch.arange(k) for _, _, k in tokens.each()])


def expected_texts(case: processors.Case, single: dict[str, Tensor]) -> list[list[int]]:
    """The text behind each run of visual tokens, in order: told by the strings of a processor's special tokens, which
    adapters do not know. Prompts of the cases have no line breaks of their own."""
    tokenizer = processors.processor(case.family).tokenizer
    ids = single["input_ids"][0].tolist()
    special = {*tokenizer.all_special_ids}
    tokens = tokenizer.convert_ids_to_tokens(ids)
    layout = [token_id in special for token_id in ids]
    if case.family.startswith(("gemma", "idefics", "granite_docling")):
        layout = [own or set(token) == {"\n"} for own, token in zip(layout, tokens, strict=True)]
    if case.family in ("qwen3_vl", "lfm3_vl", "cosmos3_edge"):
        text = " ".join(tokens)
        for stamp in re.finditer(r"< (?:[\d .]|<unk>)+ seconds >", text):
            first = text[: stamp.start()].count(" ")
            count = stamp[0].count(" ") + 1
            layout[first : first + count] = [True] * count
    if case.family == "video_llama3":
        text = " ".join(tokens)
        for stamp in re.finditer(r"(?:, |<unk> )?Time (?:[\d.]|<unk>)(?: (?:[\d.]|<unk>))* :", text):
            first = text[: stamp.start()].count(" ")
            layout[first : first + stamp[0].count(" ") + 1] = [True] * (stamp[0].count(" ") + 1)
    if case.family == "molmo2":  # a stamp before each frame; that of the first is text
        text = " ".join(tokens)
        for stamp in re.finditer(r"(?<=<frame_end> )\S+ \. \S+(?= <frame_start>)", text):
            first = text[: stamp.start()].count(" ")
            layout[first : first + 3] = [True] * 3
    if case.family == "fuyu":  # words like others to its tokenizer
        layout = [own or token in ("|SPEAKER|", "|NEWLINE|") for own, token in zip(layout, tokens, strict=True)]
    if case.family.startswith("gemma4"):  # a stamp before each frame; that of the first is text
        text = " ".join(tokens)
        for stamp in re.finditer(r"(?<=<\|video\|> <image\|> )\S+ : \S+(?= <\|image> <\|video\|>)", text):
            first = text[: stamp.start()].count(" ")
            layout[first : first + 3] = [True] * 3
    if case.family == "glm46v":  # a stamp behind each frame
        inside = False
        for column, token in enumerate(tokens):
            inside = (inside or token == "<|begin_of_video|>") and token != "<|end_of_video|>"
            layout[column] |= inside
    if case.family.startswith("minicpm"):  # the number of an image, and line breaks between rows of slices
        opens = [column for column, token in enumerate(tokens) if token == "<image_id>"]
        layout = [own or column - 1 in opens or tokens[column] == "\n" for column, own in enumerate(layout)]
    if case.family == "kimi_k25":  # the kind of medium
        begins = [column for column, token in enumerate(tokens) if token == "<|media_begin|>"]
        layout = [own or column - 1 in begins for column, own in enumerate(layout)]
    language = [None if own else token_id for own, token_id in zip(layout, ids, strict=True)]
    visual = [token_id in (IMAGE, VIDEO) for token_id in ids]
    ends = [c for c, own in enumerate(visual) if own and not (c + 1 < len(ids) and visual[c + 1])]
    return [[token_id for token_id in language[end:] if token_id is not None] for end in ends]


@every_case
def test_before_the_language_model(case):
    """Of every image and video, or of every tile and frame that is one of its own: alone, and in a padded batch."""
    model = families.shared(case.family)
    embed, numbers = model.get_input_embeddings(), range(len(case.requests))
    singles = [case.inputs(number) for number in numbers]
    texts = [expected_texts(case, single) for single in singles]
    calls = [*zip(singles, texts, strict=True), (case.inputs(*numbers, padding=True), sum(texts, []))]
    for inputs, expected in calls:
        SEEN.clear()
        with vtprune.prune(model, Questions(keep_ratio=0.5), strict=False):
            model(**inputs)
        # A row of an image, or a frame of a video, has nothing of its own behind it.
        assert {*map(flat, SEEN)} == {flat(embed(torch.tensor(text))) for text in expected}


@every_case
def test_inside_the_language_model(case):
    """The same, of each sample's last image, in a padded batch."""
    model, numbers = families.shared(case.family), range(len(case.requests))
    if case.family not in families.PRUNED_INSIDE:
        pytest.skip("nothing goes inside its language model")
    inputs = case.inputs(*numbers, padding=True)
    states = model(**inputs, output_hidden_states=True).hidden_states[1]
    adapter = vtprune.adapter_for(model)
    states = adapter.normed(adapter.token_states(states))
    SEEN.clear()
    with vtprune.prune(model, TextInside()):
        model(**inputs)
    for number in numbers:
        ids = inputs["input_ids"][number]
        visual = torch.isin(ids, torch.tensor([IMAGE, VIDEO])).nonzero().flatten().tolist()
        if not visual:
            continue
        text = expected_texts(case, case.inputs(number))[-1]
        columns = []
        for column in reversed(range(visual[-1], len(ids))):  # what stands before it may hold the same words
            if len(columns) < len(text) and int(ids[column]) == text[-1 - len(columns)]:
                columns.insert(0, column)
        assert ids[columns].tolist() == text
        torch.testing.assert_close(SEEN[number], states[number, columns], atol=1e-4, rtol=1e-4)


def flat(question: Tensor) -> tuple[float, ...]:
    return tuple(question.flatten().tolist())
