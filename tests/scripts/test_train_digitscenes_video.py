# SPDX-License-Identifier: Apache-2.0
"""The video training script: what it trains on is what a test prompt looks like, and its labels are what is drawn."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.video_utils import VideoMetadata

from vtprune.eval import digitscenes
from vtprune.eval.digitscenes.clips import DIRECTIONS
from vtprune.eval.digitscenes.video_model import FRAME_TOKENS, FRAMES, build_video_model, build_video_processor

SCRIPT = "train_digitscenes_video"

TOKENS = FRAMES * FRAME_TOKENS


@pytest.fixture(scope="module")
def clips(script):
    return [script.draw_training_clip(0, number, "train") for number in range(20)]


@torch.no_grad()
def test_packed_questions_see_what_a_prompt_sees(script):
    """Logits of three questions packed behind one clip equal those of three prompts through the whole model."""
    torch.manual_seed(0)
    model, processor = build_video_model().eval(), build_video_processor()
    examples = digitscenes.video_examples(limit=3)
    frames = examples[0].clip.frames(FRAMES)
    pack = script.Pack.of([[script.Block.make(e.question, [e.answer], e.family) for e in examples]])
    decoder = script.VideoDecoder(model, "cpu")
    visual = decoder.project(script.encode_frames(model.model.vision_tower, frames, "cpu")[None])
    hidden = decoder.hidden(visual, script.every_token(1, FRAMES), pack, compact=False, total=visual.shape[1])[-1]
    packed = model.lm_head(hidden[:, len(script.PREFIX) + visual.shape[1] :])[pack.answers]

    metadata = VideoMetadata(total_num_frames=FRAMES, fps=12)
    alone = []
    for example in examples:
        text = f"USER: <video> {example.question} ASSISTANT:"
        batch = processor(videos=[frames], video_metadata=[metadata], text=text, return_tensors="pt")
        alone.append(model(**batch).logits[0, -1])
    torch.testing.assert_close(packed, torch.stack(alone), atol=1e-4, rtol=1e-4)


def test_labels_are_what_is_drawn(script, clips):
    data = script.ClipData.of(clips)
    frames = torch.arange(FRAMES) * script.STORED // FRAMES
    labels = data.labels(torch.arange(len(clips)), frames)
    colours = list(digitscenes.scenes.COLOURS)
    for n, clip in enumerate(clips):
        masks = clip.masks(script.STORED)[frames.numpy()].reshape(FRAMES, 4, 28, 4, 28).transpose(0, 1, 3, 2, 4)
        ink = masks.reshape(TOKENS, -1)
        order = []
        for token in range(TOKENS):
            counts = np.bincount(ink[token], minlength=6)[1:]
            if counts.max() < 30:
                assert labels.digit[n, token] == 0
                continue
            item = int(counts.argmax())
            actor = clip.actors[item]
            order += [item] if item not in order else []
            assert labels.digit[n, token] == actor.value + 1 and labels.colour[n, token] == 1 + colours.index(
                actor.colour
            )
            assert labels.rank[n, token] == order.index(item) and labels.time[n, token] == token // FRAME_TOKENS
            if (way := int(labels.direction[n, token])) >= 0:
                assert [None, *DIRECTIONS][way] == actor.direction
            rows, columns = actor.box(int(frames[token // FRAME_TOKENS]), script.STORED)
            middle = (columns.start + actor.size // 2) // 14, (rows.start + actor.size // 2) // 14
            assert tuple(labels.centre[n, token].tolist()) == middle
    seen = labels.direction[labels.digit > 0]
    assert set(seen.tolist()) == {-1, 0, 1, 2, 3, 4}


def test_captions_and_questions_are_true(script, clips):
    for clip in clips:
        value = {str(a.value): a for a in clip.actors}
        rng = np.random.RandomState(0)
        blocks = script.clip_caption_blocks(rng, clip.actors, [a.start for a in clip.actors])
        lists = {b.family: b.words[b.words.index("assistant:") + 1 :] for b in blocks}
        assert [value[v].start for v in lists["appears"]] == sorted(a.start for a in clip.actors)
        lists.pop("appears")
        pairs = {name: list(zip(words[::2], words[1::2], strict=True)) for name, words in lists.items()}
        assert {(value[v].colour, v) for v in value} == set(pairs["colour digit"])
        assert {(v, value[v].colour) for v in value} == set(pairs["digit colour"])
        assert all((value[v].direction or "still") == way for v, way in pairs.get("digit moves", []))
        assert all(value[v].direction == way for way, v in pairs.get("moves digit", []))
        moving = {(way, value[v].colour) for way, v in pairs.get("moves digit", [])}
        assert moving == set(pairs.get("moves colour", []))
        for v, when in pairs.get("digit seen", []):
            third = {"start": (0, 16), "middle": (16, 32), "end": (32, 48), "always": (0, 48)}[when]
            assert third[0] <= value[v].start and value[v].end <= third[1]
        names = "start", "middle", "end"
        assert all(names.index(third) == value[v].start // 16 for v, third in pairs["digit start"])
        assert all(names.index(third) == (value[v].end - 1) // 16 for v, third in pairs["digit end"])
        asked = script.clip_question_blocks(rng, clip.actors, dict.fromkeys(digitscenes.VIDEO_FAMILIES, 3))
        assert len({" ".join(b.words) for b in asked}) == len(asked) and {"count"} <= {b.family for b in asked}


def test_training_choices_of_tokens(script):
    on_digit = torch.zeros(2, TOKENS, dtype=torch.bool)
    for seed in range(40):
        kept = script.some_tokens(np.random.RandomState(seed), on_digit, FRAMES)
        assert len(kept) == 2 and (kept.diff(dim=1) > 0).all() and kept.min() >= 0 and (kept[:, -1] == TOKENS).all()
    rng = np.random.RandomState(0)
    frames = script.sample(rng, 8)
    assert len(frames) == 8 and (frames.diff() >= 2).all() and frames.max() < script.STORED


@torch.no_grad()
def test_start_from_the_image_checkpoint(script):
    """Frames look to the new encoder about as they look to the old one: SigLIP has no norm where CLIP has one."""
    torch.manual_seed(0)
    model = build_video_model().eval()
    old = AutoModelForImageTextToText.from_pretrained(digitscenes.MODEL_PATH).eval()
    pixels = torch.from_numpy(digitscenes.video_examples(limit=4)[3].clip.frames(4)).permute(0, 3, 1, 2)
    script.warm_start(model, old, pixels)
    embedded = model.model.vision_tower.embeddings(script.model_input(pixels, "cpu"))
    clip = old.model.vision_tower
    patch = clip.embeddings.patch_embedding(script.model_input(pixels, "cpu")).flatten(2).mT
    place = clip.embeddings.position_embedding.weight[1:].unflatten(0, (12, 12))[:8, :8].flatten(0, 1)
    normed = clip.pre_layrnorm(patch + place)
    similar = torch.nn.functional.cosine_similarity(embedded.flatten(0, 1), normed.flatten(0, 1))
    assert similar.mean() > 0.95
    words = old.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[: len(words)], words)
    layer = model.model.language_model.layers[7].self_attn
    assert torch.equal(layer.q_proj.weight, old.model.language_model.layers[7].self_attn.q_proj.weight)
    assert not layer.q_proj.bias.any()
