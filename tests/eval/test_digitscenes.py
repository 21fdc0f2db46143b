# SPDX-License-Identifier: Apache-2.0
"""DigitScenes: the same everywhere, right answers, and a checkpoint that has learned them."""

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vtprune.eval import digitscenes
from vtprune.eval.digitscenes.model import VISUAL_TOKENS, VOCABULARY, build_model, build_processor
from vtprune.eval.digitscenes.questions import ask
from vtprune.eval.digitscenes.scenes import COLOURS, SPLITS, digit_images, draw_scene


def scene_of(example, split="test", seed=0):
    return draw_scene(np.random.RandomState([seed, list(SPLITS).index(split), example.index]), split)


def true_answer(question: str, digits) -> str:
    """The answer read off the scene, without the code that asks."""
    words = question.split()
    value_of = {d.colour: d.value for d in digits}
    colour_of = {str(d.value): d.colour for d in digits}
    match words:
        case ["what", "digit", "is", colour, "?"] if colour in COLOURS:
            return str(value_of[colour])
        case ["what", "colour", "is", value, "?"]:
            return colour_of[value]
        case ["is", "there", "a", colour, value, "?"]:
            return "yes" if colour_of.get(value) == colour else "no"
        case ["how", "many", *_]:
            return str(len(digits))
        case ["what", "digit", "is", side, "?"]:
            axis, last = {"leftmost": (0, 0), "rightmost": (0, 1), "topmost": (1, 0), "bottom": (1, 1)}[side]
            ordered = sorted(digits, key=lambda d: (d.x, d.y)[axis] + d.size / 2)
            return str(ordered[-last].value)
        case ["which", "is", word, first, "or", second, "?"]:
            return (max if word == "larger" else min)((first, second), key=value_of.get)
    raise AssertionError(f"unknown question {question!r}")


@pytest.fixture(scope="module")
def test_set():
    return digitscenes.examples()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(digitscenes.MODEL_PATH)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(digitscenes.MODEL_PATH).eval()


def prompts(processor, examples) -> list[str]:
    content = [[{"type": "image"}, {"type": "text", "text": e.question}] for e in examples]
    return [
        processor.apply_chat_template([{"role": "user", "content": c}], add_generation_prompt=True) for c in content
    ]


def inputs(processor, examples):
    images = [e.image for e in examples]
    return processor(images=images, text=prompts(processor, examples), return_tensors="pt", padding=True)


def test_set_is_balanced_and_large(test_set):
    counts = Counter(e.family for e in test_set)
    assert len(test_set) >= 1000 and set(counts) == set(digitscenes.FAMILIES) and len(set(counts.values())) == 1
    yes = [e.answer == "yes" for e in test_set if e.family == "presence"]
    assert 0.4 < np.mean(yes) < 0.6
    assert {e.image.size for e in test_set} == {(168, 168)} and {e.image.mode for e in test_set} == {"RGB"}


def test_same_set_everywhere(test_set):
    again = digitscenes.examples(limit=30)
    assert [(e.question, e.answer, e.image.tobytes()) for e in again] == [
        (e.question, e.answer, e.image.tobytes()) for e in test_set[:30]
    ]
    digest = hashlib.sha256(b"".join(e.image.tobytes() + f"{e.question}{e.answer}".encode() for e in again))
    assert digest.hexdigest() == "bbfddbf8a7bdab808b8ed213877b37b0cb060c81ff340fbf78938cf449e94a54"


@pytest.mark.parametrize("other", [{"seed": 1}, {"split": "train"}])
def test_other_seed_or_split_is_another_set(other, test_set):
    images = {e.image.tobytes() for e in test_set}
    assert not images & {e.image.tobytes() for e in digitscenes.examples(limit=20, **other)}


def test_splits_share_no_handwritten_digit():
    seen = [{image.tobytes() for of_value in digit_images(split) for image in of_value} for split in SPLITS]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 1797


def test_answers_are_true(test_set):
    for example in test_set[::2] + test_set[1::7]:
        assert true_answer(example.question, scene_of(example).digits) == example.answer, example.question


def test_picture_shows_the_digits(test_set):
    for example in test_set[:40]:
        scene = scene_of(example)
        assert np.array_equal(scene.pixels, np.asarray(example.image))
        assert 2 <= len(scene.digits) <= 6
        assert len({d.value for d in scene.digits}) == len({d.colour for d in scene.digits}) == len(scene.digits)
        for i, digit in enumerate(scene.digits):
            ink = scene.mask == i + 1
            rows, columns = np.nonzero(ink)
            assert digit.y <= rows.min() and rows.max() < digit.y + digit.size
            assert digit.x <= columns.min() and columns.max() < digit.x + digit.size
            tint = scene.pixels[ink].mean(0)
            assert min(COLOURS, key=lambda name: np.abs(tint - COLOURS[name]).sum()) == digit.colour


def test_negatives_are_hard(test_set):
    """Every "no" names a colour or a digit of the scene, about half of them both."""
    both = []
    for example in test_set:
        if example.answer == "no":
            digits, words = scene_of(example).digits, example.question.split()
            there = [words[3] in {d.colour for d in digits}, words[4] in {str(d.value) for d in digits}]
            assert any(there)
            both.append(all(there))
    assert 0.3 < np.mean(both) < 0.7


def test_outermost_digit_leads_clearly():
    """Two digits a pixel apart in a direction are not asked about where another direction is clear."""
    digits = draw_scene(np.random.RandomState(0), "train").digits[:2]
    first, second = (replace(d, x=x, y=y, size=30) for d, x, y in zip(digits, (50, 51), (20, 90), strict=True))
    asked = {ask(np.random.RandomState(i), (first, second), "position").text.split()[3] for i in range(30)}
    assert asked == {"topmost", "bottom"}


@pytest.mark.parametrize(
    ("prediction", "expected"), [("7", 1.0), (" 7 ", 1.0), ("7.", 1.0), ("17", 0.0), ("7 7", 0.0), ("", 0.0)]
)
def test_score_is_exact(prediction, expected):
    assert digitscenes.score(prediction, "7") == expected


def test_prompt_and_visual_tokens(processor, test_set):
    assert prompts(processor, test_set[:1]) == [f"USER: <image> {test_set[0].question} ASSISTANT:"]
    batch = inputs(processor, test_set[:6])
    is_image = batch["input_ids"] == processor.image_token_id
    assert (is_image.sum(1) == VISUAL_TOKENS).all() and batch["pixel_values"].shape == (6, 3, 168, 168)
    assert (batch["attention_mask"][:, -1] == 1).all() and (batch["attention_mask"][:, 0] == 0).any()  # left padding
    assert processor.tokenizer.unk_token_id not in batch["input_ids"]
    spelled = processor.tokenizer("What colour is 7?")["input_ids"]
    assert spelled == processor.tokenizer("what colour is 7 ?")["input_ids"]


def test_answered_turn_in_the_template(processor):
    turns = [{"role": "user", "content": "how many digits are there ?"}, {"role": "assistant", "content": "3"}]
    assert processor.apply_chat_template(turns).split() == (
        ["USER:", "how", "many", "digits", "are", "there", "?", "ASSISTANT:", "3", "</s>"]
    )


def test_saved_files_match_the_code(model, processor):
    files = [f for f in digitscenes.MODEL_PATH.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 12e6
    fresh = build_model()
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert processor.tokenizer.convert_ids_to_tokens(range(len(VOCABULARY))) == VOCABULARY
    assert processor.chat_template == build_processor().chat_template
    assert len(model.model.language_model.layers) >= 8


@torch.no_grad()
def test_checkpoint_answers(model, processor, test_set):
    right = []
    for start in range(0, 60, 20):
        batch = inputs(processor, test_set[start : start + 20])
        out = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch["input_ids"].shape[1] :]
        assert out.shape[1] == 2 and (out[:, 1] == processor.tokenizer.eos_token_id).all()  # one word, then </s>
        words = processor.batch_decode(out, skip_special_tokens=True)
        right += [digitscenes.score(w, e.answer) for w, e in zip(words, test_set[start:], strict=False)]
    assert np.mean(right) >= 0.8


@torch.no_grad()
def test_padding_changes_nothing(model, processor, test_set):
    """A batch of prompts of different lengths gives the logits of each prompt alone."""
    examples = test_set[:6]
    together = model(**inputs(processor, examples)).logits[:, -1]
    alone = torch.cat([model(**inputs(processor, [e])).logits[:, -1] for e in examples])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_cls_looks_at_the_digits(model, processor, test_set):
    """Attention of CLS where methods read it (the layer that makes the features) falls on digits, not on background."""
    model.model.vision_tower.set_attn_implementation("eager")
    attention = model.model.vision_tower(inputs(processor, test_set[:20])["pixel_values"], output_attentions=True)
    model.model.vision_tower.set_attn_implementation("sdpa")
    row = attention.attentions[-2][:, :, 0, 1:].mean(1)  # (images, tokens)
    masks = np.stack([scene_of(e).mask for e in test_set[:20]]).reshape(20, 12, 14, 12, 14)
    on = torch.from_numpy((masks > 0).sum((2, 4)).reshape(20, -1) >= 12)
    assert row[on].mean() > 2 * row[~on].mean()
