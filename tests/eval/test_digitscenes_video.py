# SPDX-License-Identifier: Apache-2.0
"""DigitScenes-Video: the same everywhere, right answers, files that hold the frames, and a trained checkpoint."""

import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import load_video

from vtprune.eval import digitscenes
from vtprune.eval.digitscenes.clips import FRAME_SIZE, LEAD
from vtprune.eval.digitscenes.scenes import COLOURS, SPLITS
from vtprune.eval.digitscenes.video_model import (
    FRAME_TOKENS,
    FRAMES,
    VIDEO_VOCABULARY,
    build_video_model,
    build_video_processor,
)

VIDEO_TOKENS = FRAMES * FRAME_TOKENS + 1


@pytest.fixture(scope="module")
def test_set():
    return digitscenes.video_examples()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(digitscenes.VIDEO_MODEL_PATH)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(digitscenes.VIDEO_MODEL_PATH).eval()


def prompts(processor, examples) -> list[str]:
    content = [[{"type": "video"}, {"type": "text", "text": e.question}] for e in examples]
    return [
        processor.apply_chat_template([{"role": "user", "content": c}], add_generation_prompt=True) for c in content
    ]


def inputs(processor, examples, folder):
    """The files decoded in full, then sampled by the processor."""
    videos, metadata = zip(*(load_video(str(e.video_path(folder)), backend="pyav") for e in examples), strict=True)
    return processor(
        videos=list(videos),
        video_metadata=list(metadata),
        text=prompts(processor, examples),
        return_tensors="pt",
        padding=True,
    )


def path_of(mask: np.ndarray, item: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames in which digit `item` shows ink, and the middle of its ink (x, y) there."""
    shown = [np.argwhere(frame == item + 1) for frame in mask]
    seen = np.array([n for n, where in enumerate(shown) if len(where)])
    return seen, np.array([shown[n].mean(0)[::-1] for n in seen])


def true_answer(example) -> str:
    """The answer read off the drawn ink, without the code that asks."""
    actors, frames = example.clip.actors, example.clip.count
    paths = [path_of(example.clip.masks(), i) for i in range(len(actors))]
    directions = []
    for seen, middle in paths:
        x, y = middle[-1] - middle[0]
        if max(abs(x), abs(y)) < 3 or len(seen) < frames:
            directions.append(None)
        else:
            directions.append(("right" if x > 0 else "left") if abs(x) > abs(y) else "down" if y > 0 else "up")
    value_of, colour_of = [str(a.value) for a in actors], [a.colour for a in actors]
    match example.question.split():
        case ["what", "digit", "appears", word, "?"]:
            starts = [seen[0] for seen, _ in paths]
            return value_of[int(np.argmin(starts) if word == "first" else np.argmax(starts))]
        case ["what", "digit", "moves", direction, "?"]:
            return value_of[directions.index(direction)]
        case ["what", "colour", "moves", "?"]:
            (moving,) = [colour for colour, direction in zip(colour_of, directions, strict=True) if direction]
            return moving
        case ["what", "colour", "moves", direction, "?"]:
            assert sum(map(bool, directions)) == 2
            return colour_of[directions.index(direction)]
        case ["how", "many", *_]:
            return str(len(paths))
        case ["when", "is", value, "seen", "?"]:
            seen = paths[value_of.index(value)][0]
            thirds = set(seen * 3 // frames)
            assert len(thirds) == 1
            return ("start", "middle", "end")[thirds.pop()]
    raise AssertionError(f"unknown question {example.question!r}")


def test_set_is_balanced(test_set):
    counts = Counter(e.family for e in test_set)
    assert len(test_set) >= 200 and set(counts) == set(digitscenes.VIDEO_FAMILIES) and len(set(counts.values())) == 1
    for family, at_most in dict(order=0.25, motion=0.25, mover=0.3, count=0.4, third=0.5).items():
        answers = Counter(e.answer for e in test_set if e.family == family)
        assert max(answers.values()) / sum(answers.values()) < at_most, family


def test_same_set_everywhere(test_set):
    again = digitscenes.video_examples(limit=15)
    parts = [e.frames().tobytes() + f"{e.question}{e.answer}".encode() for e in again]
    assert parts == [e.frames().tobytes() + f"{e.question}{e.answer}".encode() for e in test_set[:15]]
    assert (
        hashlib.sha256(b"".join(parts)).hexdigest()
        == "ed6a86cbfc1345926460f32dcfff198c94c7d147dac0d6c90705b1670253aa7a"
    )


@pytest.mark.parametrize("other", [{"seed": 1}, {"split": "train"}])
def test_other_seed_or_split_is_another_set(other, test_set):
    clips = {e.frames().tobytes() for e in test_set}
    assert not clips & {e.frames().tobytes() for e in digitscenes.video_examples(limit=20, **other)}


def test_splits_draw_their_own_handwritten_digits(monkeypatch):
    """Clips take them where scenes do, by split."""
    from vtprune.eval.digitscenes import clips

    asked = []
    monkeypatch.setattr(clips, "digit_images", lambda split: asked.append(split) or [[np.zeros((8, 8), np.uint8)]] * 10)
    for split in SPLITS:
        asked.clear()
        digitscenes.video_examples(split, limit=5)
        assert set(asked) == {split}


def test_answers_are_true(test_set):
    for example in test_set:
        assert true_answer(example) == example.answer, (example.index, example.question)


def test_clips_show_what_they_say(test_set):
    for example in test_set[::7]:
        clip = example.clip
        frames, masks = clip.frames(), clip.masks()
        assert frames.shape == (clip.count, FRAME_SIZE, FRAME_SIZE, 3) and 24 <= clip.count <= 48
        assert 2 <= len(clip.actors) <= 5
        assert len({a.value for a in clip.actors}) == len({a.colour for a in clip.actors}) == len(clip.actors)
        for i, actor in enumerate(clip.actors):
            tint = frames[masks == i + 1].mean(0)
            assert min(COLOURS, key=lambda name: np.abs(tint - COLOURS[name]).sum()) == actor.colour
            assert actor.end - actor.start >= LEAD


def test_digits_never_touch_and_the_rest_stays(test_set):
    for example in test_set[::3]:
        frames = example.frames()
        for number in range(example.clip.count):
            taken = np.zeros((FRAME_SIZE, FRAME_SIZE), bool)
            for actor in example.clip.actors:
                if box := actor.box(number, example.clip.count):
                    assert taken[box].shape == (actor.size, actor.size) and not taken[box].any()
                    taken[box] = True
            assert np.array_equal(frames[number][~taken], example.clip.background[~taken])


def test_processor_sees_every_digit_and_lead(test_set):
    """Of the frames that it samples two at least show each digit, and two the first (or last) to appear alone."""
    for example in test_set:
        count = example.clip.count
        sampled = np.arange(FRAMES) * count // FRAMES
        seen = [[bool(actor.box(n, count)) for n in sampled] for actor in example.clip.actors]
        assert min(map(sum, seen)) >= 2
        if example.family == "order":
            starts = sorted(row.index(True) for row in seen)
            first = "first" in example.question
            assert starts[1] - starts[0] >= 2 if first else starts[-1] - starts[-2] >= 2


def test_file_holds_the_frames(processor, test_set, folder):
    for example in test_set[:5]:
        path = example.video_path(folder)
        frames, metadata = load_video(str(path), backend="pyav")
        assert frames.shape == example.frames().shape and metadata.fps == 12
        sampled = processor.video_processor([frames], video_metadata=[metadata], return_tensors="pt")[
            "pixel_values_videos"
        ][0]
        expected = example.frames()[np.arange(FRAMES) * example.clip.count // FRAMES]
        grey = (sampled * 0.3 + 0.3).permute(0, 2, 3, 1).numpy() * 255
        assert np.abs(grey - expected).mean() < 2 and np.abs(grey - expected).max() < 30


def test_file_is_written_once(test_set, tmp_path, monkeypatch):
    path = test_set[0].video_path(tmp_path)
    stamp = path.stat().st_mtime_ns
    assert test_set[0].video_path(tmp_path) == path and path.stat().st_mtime_ns == stamp
    assert test_set[1].video_path(tmp_path) != path

    def fail(frames, part):
        Path(part).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr("vtprune.eval.digitscenes.mp4._write", fail)
    before = set(tmp_path.iterdir())
    with pytest.raises(OSError, match="disk full"):
        test_set[2].video_path(tmp_path)
    assert set(tmp_path.iterdir()) == before


def test_files_lie_in_the_cache(tmp_path):
    code = "from vtprune.eval.digitscenes import video_examples; print(video_examples(limit=1)[0].video_path())"
    run = subprocess.run(
        [sys.executable, "-c", code], env={"HF_HOME": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith(str(tmp_path)) and run.stdout.strip().endswith(".mp4")


def test_prompt_and_visual_tokens(processor, test_set, folder):
    assert prompts(processor, test_set[:1]) == [f"USER: <video> {test_set[0].question} ASSISTANT:"]
    batch = inputs(processor, test_set[:5], folder)
    is_video = batch["input_ids"] == processor.video_token_id
    assert (is_video.sum(1) == VIDEO_TOKENS).all()
    assert batch["pixel_values_videos"].shape == (5, FRAMES, 3, FRAME_SIZE, FRAME_SIZE)
    assert (batch["attention_mask"][:, -1] == 1).all() and (batch["attention_mask"][:, 0] == 0).any()  # left padding
    words = processor.tokenizer([e.question for e in test_set])["input_ids"]
    assert all(processor.tokenizer.unk_token_id not in ids for ids in words)


def test_saved_files_match_the_code(model, processor):
    files = [f for f in digitscenes.VIDEO_MODEL_PATH.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 12e6
    fresh, built = build_video_model(), build_video_processor()
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert processor.tokenizer.convert_ids_to_tokens(range(len(VIDEO_VOCABULARY))) == VIDEO_VOCABULARY
    assert processor.chat_template == built.chat_template
    assert processor.video_processor.to_dict() == built.video_processor.to_dict()
    assert len(model.model.language_model.layers) >= 8


@torch.no_grad()
def test_checkpoint_answers(model, processor, test_set, folder):
    right = []
    for start in range(0, 60, 20):
        batch = inputs(processor, test_set[start : start + 20], folder)
        out = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch["input_ids"].shape[1] :]
        assert out.shape[1] == 2 and (out[:, 1] == processor.tokenizer.eos_token_id).all()  # one word, then </s>
        words = processor.batch_decode(out, skip_special_tokens=True)
        right += [digitscenes.score(w, e.answer) for w, e in zip(words, test_set[start:], strict=False)]
    assert np.mean(right) >= 0.85


@torch.no_grad()
def test_padding_changes_nothing(model, processor, test_set, folder):
    """A batch of prompts of different lengths gives the logits of each prompt alone."""
    examples = test_set[:5]
    together = model(**inputs(processor, examples, folder)).logits[:, -1]
    alone = torch.cat([model(**inputs(processor, [e], folder)).logits[:, -1] for e in examples])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_takes_images_too(model, processor, test_set):
    image = Image.fromarray(test_set[0].frames()[0])
    batch = processor(images=image, text="USER: <image> how many digits are there ? ASSISTANT:", return_tensors="pt")
    assert (batch["input_ids"] == processor.image_token_id).sum() == 64 + 64 + 8  # base, tile, newlines
    assert model(**batch).logits.isfinite().all()
