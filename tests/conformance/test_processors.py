# SPDX-License-Identifier: Apache-2.0
"""Inputs as the families' own processors make them, and nothing of ours between a processor and its model."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import vtprune
from vtprune.eval import digitscenes
from vtprune.testing import families
from vtprune.testing.recompute import recompute, visual_columns

from . import processors
from .matrix import refusal
from .methods import spec

ATOL = 1e-4
NEW = 4
METHODS = ("divprune", "mmtok", "fastv")
ROUGH = ("hunyuan_vl", "hy_v4_vl", "step3p7")
"""Families that keep roughly the share of tokens asked for."""

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # PaliGemma's processor with NumPy 2
every_method = pytest.mark.parametrize("method", METHODS)
every_case = pytest.mark.parametrize("case", processors.CASES.values(), ids=processors.CASES)


def model_for(case: processors.Case, method: str):
    """The tiny model of a case's family; skips the test if it refuses the method, which the matrix looks into."""
    model = families.shared(case.family)
    if (reason := refusal(model, spec(method))) is not None:
        pytest.skip(reason)
    return model


def generate(model, inputs):
    return model.generate(**inputs, max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True)


def steps(output) -> Tensor:
    """(batch, new tokens, vocabulary)"""
    return torch.stack(output.logits, 1)


def test_every_family_has_a_processor_or_a_reason_why_not():
    here = {*processors._PROCESSORS, *processors.ALIKE}
    assert here.isdisjoint(processors.MISSING)
    assert not set(families.NAMES) - here - set(processors.MISSING)
    assert {case.family for case in processors.CASES.values()} == set(processors._PROCESSORS)


def together(case: processors.Case):
    return case.inputs(*range(len(case.requests)), padding=True)


def alone(case: processors.Case) -> list[dict[str, Tensor]]:
    """The inputs of each request by itself."""
    return [case.inputs(number) for number in range(len(case.requests))]


def assert_recomputed(model, session, output, sample: int, padding: int, single: dict[str, Tensor]) -> None:
    """One sample of a left-padded batch gives, at every step, what its own inputs give without the same tokens."""
    report, logits = session.report, steps(output)[sample]
    kept = [report.kept(sample, layer) - padding for layer in range(report.depth)]
    generated = output.sequences[sample, -len(logits) :]
    expected = recompute(model, single, generated[:-1], kept, session.methods[0].positions)[-len(logits) :]
    torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0, msg=lambda m: f"sample {sample}: {m}")
    assert generated.tolist() == expected.argmax(-1).tolist()


@every_method
@every_case
def test_padded_batch(case, method):
    """Prompts of different lengths with media of different sizes, or none: each sample as if it came alone."""
    model = model_for(case, method)
    inputs, singles = together(case), alone(case)
    lengths = [single["input_ids"].shape[1] for single in singles]
    assert inputs["attention_mask"].sum(1).tolist() == lengths and len(set(lengths)) == len(lengths)
    with vtprune.prune(model, method, keep_ratio=0.4) as session:
        reports = [(generate(model, single), session.report)[1] for single in singles]
        output = generate(model, inputs)
    report = session.report
    # Tiles and pixels that pad the batch cost nothing.
    for cost in ("encoder_flops", "prefill_flops", "kv_bytes"):
        if getattr(report, cost) is not None:  # encoders that are no ViT are not counted
            assert getattr(report, cost) == pytest.approx(sum(getattr(own, cost) for own in reports))
    placeholders = [len(visual_columns(model, single)) for single in singles]
    assert report.original_tokens == placeholders
    if method == "fastv":
        assert report.counts[:, 0].tolist() == placeholders
    # Newline tokens do not count towards a budget, and of tiles with few tokens the share is a rough one.
    rough = hasattr(vtprune.adapter_for(model).base, "image_newline") or case.family in (
        "hunyuan_vl",
        "hy_v4_vl",
        "molmo2",
        "step3p7",
    )
    assert report.keep_ratio == pytest.approx(0.4, abs=0.15 if rough else 0.05)
    for sample, single in enumerate(singles):
        padding = max(lengths) - lengths[sample]
        assert (report.kept(sample) - padding).tolist() == reports[sample].kept(0).tolist()
        if placeholders[sample]:
            assert 0 < report.final_tokens[sample] < placeholders[sample]
            assert_recomputed(model, session, output, sample, padding, single)
        else:
            unpruned = generate(model, single)
            torch.testing.assert_close(steps(output)[sample], steps(unpruned)[0], atol=ATOL, rtol=0)


@every_method
@every_case
def test_keep_everything(case, method):
    model, inputs = model_for(case, method), together(case)
    expected = generate(model, inputs)
    with vtprune.prune(model, method, keep_ratio=1.0) as session:
        output = generate(model, inputs)
    assert session.report.keep_ratio == 1
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(steps(output), steps(expected))


# -- a trained model with a chat template -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(digitscenes.MODEL_PATH).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(digitscenes.MODEL_PATH)


def asked(example) -> dict:
    content = [{"type": "image", "image": example.image}, {"type": "text", "text": example.question}]
    return {"role": "user", "content": content}


def chat_inputs(processor, chats: list[list[dict]]):
    return processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


@every_method
@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline(model, processor, method, batch_size):
    """A pipeline answers what generate() answers, from the same tokens."""
    examples = digitscenes.examples(limit=6)
    answering = pipeline("image-text-to-text", model=model, processor=processor, batch_size=batch_size)
    right = 0.0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        chats = [[asked(example)] for example in batch]
        with vtprune.prune(model, method, keep_ratio=0.3) as session:
            records = answering(text=chats, max_new_tokens=NEW, return_full_text=False)
        answers = [record["generated_text"].strip() for (record,) in records]
        assert session.report.original_tokens == [144] * batch_size
        assert session.report.keep_ratio == pytest.approx(0.3, abs=0.01)

        inputs = chat_inputs(processor, chats)
        with vtprune.prune(model, method, keep_ratio=0.3) as equal:
            output = generate(model, inputs)
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        assert answers == [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        assert session.report.to_dict() == equal.report.to_dict()
        right += sum(digitscenes.score(answer, example.answer) for answer, example in zip(answers, batch, strict=True))
    assert right >= 4


@every_method
def test_second_turn_with_a_second_image(model, processor, method):
    """The whole conversation is sent again: both images are pruned, each to its share by methods that go by image."""
    first, second = digitscenes.examples(limit=2)
    chat = [asked(first)]
    with vtprune.prune(model, method, keep_ratio=0.3) as session:
        inputs = chat_inputs(processor, [chat])
        output = generate(model, inputs)
        earlier = session.report
        assert_recomputed(model, session, output, 0, 0, inputs)
        answer = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer.strip()}]}
        inputs = chat_inputs(processor, [[*chat, reply, asked(second)]])
        output = generate(model, inputs)
        report = session.report
        assert_recomputed(model, session, output, 0, 0, inputs)
    columns = visual_columns(model, inputs)
    assert report.original_tokens == [288] and columns.tolist() == report.visual[0].tolist()
    for layer in range(report.depth):
        shares = [int(torch.isin(report.kept(0, layer), image).sum()) for image in columns.view(2, 144)]
        if method == "fastv":  # chooses among all images together
            assert sum(shares) == 2 * earlier.counts[0, layer]
        else:
            assert shares == [earlier.counts[0, layer]] * 2 == [43, 43]
    if method == "divprune":  # never looks at the text, so what came before changes nothing
        assert report.kept(0)[:43].tolist() == earlier.kept(0).tolist()
