# SPDX-License-Identifier: Apache-2.0
"""What stands behind the prompt in a call, guesses or an answer, decides nothing: the prompt alone does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import vtprune
from vtprune.errors import ConfigError
from vtprune.testing import families

from . import matrix, models
from .methods import METHODS, evicts, revives, spec
from .models import batch_of_three, prompts
from .reference import generate

CELLS = [
    pytest.param(*cell, marks=[] if cell[0] == "llava" else [pytest.mark.slow], id="-".join(cell))
    for cell in matrix.CELLS
    if matrix.in_turns(*cell)
]
ANSWER = (7, 9, 8, 7)


def with_answer(inputs: dict[str, Tensor], answer: tuple[int, ...], name: str) -> dict[str, Tensor]:
    """The inputs of one sample with tokens behind the prompt, as the family's processor marks them."""
    tokens = torch.tensor([answer])
    extended = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    found = [key for key in inputs if key.endswith("token_type_ids")]
    extended |= {types: torch.full_like(tokens, int(name.startswith("paligemma"))) for types in found}
    return inputs | {key: torch.cat([inputs[key], more.to(inputs[key])], 1) for key, more in extended.items()}


def chosen(report: vtprune.Report) -> list[list[int]]:
    return [report.kept(0, layer).tolist() for layer in range(report.depth)]


def forced(model, inputs: dict[str, Tensor]) -> Tensor:
    """(answer tokens, vocabulary): logits of `generate()`, made to give the answer."""
    length = inputs["input_ids"].shape[1]
    output = generate(
        model,
        inputs,
        new_tokens=len(ANSWER),
        prefix_allowed_tokens_fn=lambda row, ids: [ANSWER[len(ids) - length]],
    )
    assert output.sequences[0, length:].tolist() == list(ANSWER)
    return torch.stack(output.logits, 1)[0]


@pytest.mark.parametrize(("name", "media", "method"), CELLS)
@torch.no_grad()
def test_a_scored_answer_changes_no_choice(name, media, method):
    """Its logits, too, are those of `generate()` forced to the same answer."""
    model = families.shared(name)
    if matrix.refusal(model, spec(method)) is not None:
        pytest.skip("refused on this family")
    inputs = families.batch(name, model, media=media).singles[0]
    length = inputs["input_ids"].shape[1]
    longer = with_answer(inputs, ANSWER, name)
    labels = torch.where(torch.arange(length + len(ANSWER)) < length, -100, longer["input_ids"])
    with vtprune.prune(model, spec(method), strict=False) as session:
        first = model(**inputs).logits[0, -1:]
        alone = session.report
        # For these a call with all answer tokens is no step of `generate()`: only the first logits are the same.
        expected = first if revives(method) or evicts(method) else forced(model, inputs)
        for told in ({"labels": labels}, {"logits_to_keep": len(ANSWER) + 1}, {"prompt_length": length}):
            session.prompt_length = told.pop("prompt_length", None)
            logits = model(**longer, **told).logits[0, -len(ANSWER) - 1 :]
            assert chosen(session.report) == chosen(alone)
            assert session.report.text_tokens == alone.text_tokens
            assert session.report.prefill_flops == alone.prefill_flops
            torch.testing.assert_close(logits[: len(expected)], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("told", ["labels", "prompt_length"])
@pytest.mark.parametrize("method", ["mmtok", "fastv", "transprune", "ltp", "aim", "sparsevlm", "random"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_with_answers_of_different_lengths(gqa, method, told, side):
    batch, answers = batch_of_three(gqa), [(7, 9), (8,), (9, 7, 8, 10)]
    ids = [torch.cat([own, torch.tensor(answer)]) for own, answer in zip(batch.ids, answers, strict=True)]
    together = models.Prompts(tuple(ids), batch.images)
    inputs, lengths = together.inputs(side), [len(own) for own in batch.ids]
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (own, length) in enumerate(zip(ids, lengths, strict=True)):
        first = together.first_column(row, side)
        labels[row, first + length : first + len(own)] = own[length:]
    options = {"prompt_length": lengths} if told == "prompt_length" else {}
    fields = {"keep_ratio": 0.5, "positions": "original"}
    with vtprune.prune(gqa, method, strict=False, **fields, **options) as session:
        gqa(**inputs, **({"labels": labels} if told == "labels" else {}))
    report = session.report
    for row in range(3):
        with vtprune.prune(gqa, method, strict=False, **fields) as session:
            gqa(**batch.one(row).inputs())
        first = together.first_column(row, side)
        assert [[c - first for c in report.kept(row, layer).tolist()] for layer in range(6)] == chosen(session.report)
        assert report.text_tokens[row] == session.report.text_tokens[0]


@pytest.mark.parametrize("method", [m for m in METHODS if not revives(m)])
@torch.no_grad()
def test_guesses_by_lookup_change_nothing(mha, method):
    """The prompt's last token stood before, so that what followed it there is guessed from the first call on."""
    prompt = prompts(mha, "ttIttttttt")
    ids = prompt.ids[0].clone()
    ids[-4:] = torch.tensor([7, 8, 9, 7])
    inputs = prompt.inputs() | {"input_ids": ids[None]}
    with vtprune.prune(mha, spec(method), strict=False) as session:
        plain, alone = generate(mha, inputs, new_tokens=8), session.report
        seen, calls = (
            [],
            mha.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
            ),
        )
        guessed = generate(mha, inputs, new_tokens=8, prompt_lookup_num_tokens=3)
        calls.remove()
    assert seen[0] > len(ids), "nothing was guessed"
    assert guessed.sequences.tolist() == plain.sequences.tolist()
    assert chosen(session.report) == chosen(alone)
    assert session.report.text_tokens == alone.text_tokens


@pytest.mark.parametrize("method", ["mmtok", "fastv", "transprune", "ltp", "aim", "sparsevlm", "random", "cdpruner"])
@torch.no_grad()
def test_guesses_of_an_assistant_model_change_nothing(mha, method):
    """A small language model guesses, mostly wrong."""
    inputs, fields = prompts(mha, "ttIttttttt").inputs(), {"keep_ratio": 0.5}
    assistant = LlamaForCausalLM(LlamaConfig(**models.TEXT | dict(num_hidden_layers=1))).eval()
    assistant.generation_config.eos_token_id = None
    assistant.generation_config.num_assistant_tokens = 3
    with vtprune.prune(mha, method, **fields) as session:
        plain, alone = generate(mha, inputs, new_tokens=8), session.report
        guessed = generate(mha, inputs, new_tokens=8, assistant_model=assistant)
    assert guessed.sequences.tolist() == plain.sequences.tolist()
    assert chosen(session.report) == chosen(alone)
    assert session.report.text_tokens == alone.text_tokens


@torch.no_grad()
def test_labels_of_the_whole_sequence_say_nothing(gqa):
    inputs = prompts(gqa, "ttItttttt").inputs()
    with vtprune.prune(gqa, "fastv", keep_ratio=0.5) as session:
        gqa(**inputs)
        alone = session.report
        gqa(**inputs, labels=inputs["input_ids"])
    assert chosen(session.report) == chosen(alone) and session.report.text_tokens == alone.text_tokens


@pytest.mark.parametrize("length", [0, [5, 5]])
def test_a_prompt_length_that_does_not_fit_is_an_error(gqa, length):
    inputs = prompts(gqa, "ttItttttt").inputs()
    with (
        vtprune.prune(gqa, "fastv", keep_ratio=0.5, prompt_length=length),
        pytest.raises(ConfigError, match="prompt_length=.*give a positive number of tokens, or one for each of the 1"),
    ):
        gqa(**inputs)
