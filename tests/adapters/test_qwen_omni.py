# SPDX-License-Identifier: Apache-2.0
"""Audio beside images, and inside videos: never dropped, never read as text, and everything else as if it were text."""

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn.functional import pad

import vtprune
from vtprune.signals import TextEmbeddings
from vtprune.testing import families
from vtprune.testing.media import AUDIO, AUDIO_END, AUDIO_START, BOS, END, IMAGE, MERGE, PAD, PATCH, START, VIDEO
from vtprune.testing.recompute import keep_all, recompute
from vtprune.testing.tiny import FAMILIES

ATOL, NEW = 1e-4, 4
MELS, LENGTHS = 128, (40, 16, 24)
"""Mel bands, and frames of the audio of each sample."""
FRAMES, ROWS, COLUMNS = 3, 2, 3
TEXTS = ((11, 12, 13), (14, 15, 16, 17, 18), (19,))
"""The text behind all media of each sample."""
QUESTIONS: list[Tensor] = []

pytestmark = pytest.mark.release
every_family = pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni"])


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def spoken(model, length: int, generator) -> tuple[Tensor, int]:
    """Mel frames (bands, length) of an audio, and its number of tokens."""
    mels = torch.randn(MELS, length, generator=generator)
    mask = torch.ones(1, length, dtype=torch.long)
    features = model.get_audio_features(mels[None], feature_attention_mask=mask, return_dict=True).last_hidden_state
    return mels, len(features)


def prompt(kind: str, audio: int, text: tuple[int, ...]) -> list[int]:
    if kind == "image":
        picture = [START, *[IMAGE] * (ROWS * COLUMNS), END]
        return [BOS, 5, *picture, 6, AUDIO_START, *[AUDIO] * audio, AUDIO_END, *text]
    # The audio of a video stands between its frames.
    frames = [VIDEO] * (ROWS * COLUMNS)
    first = audio // 2
    inside = [*frames, *[AUDIO] * first, *frames, *[AUDIO] * (audio - first), *frames]
    return [BOS, 5, START, AUDIO_START, *inside, AUDIO_END, END, *text]


def inputs_of(model, kind: str, samples: list[int]) -> dict[str, Tensor]:
    """What a processor makes of some of three samples with an audio each, padded on the left."""
    key, grids = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    grid = (1 if kind == "image" else FRAMES, MERGE * ROWS, MERGE * COLUMNS)
    ids, mels, pixels = [], [], []
    for sample in samples:
        generator = torch.Generator().manual_seed(sample)
        audio, tokens = spoken(model, LENGTHS[sample], generator)
        ids.append(prompt(kind, tokens, TEXTS[sample]))
        mels.append(audio)
        pixels.append(torch.randn(grid[0] * grid[1] * grid[2], 3 * 2 * PATCH**2, generator=generator))
    longest, frames = max(map(len, ids)), max(audio.shape[1] for audio in mels)
    inputs = {
        "input_ids": torch.tensor([[PAD] * (longest - len(one)) + one for one in ids]),
        "attention_mask": torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids]),
        "input_features": torch.stack([pad(audio, (0, frames - audio.shape[1])) for audio in mels]),
        "feature_attention_mask": torch.stack(
            [pad(torch.ones(audio.shape[1], dtype=torch.long), (0, frames - audio.shape[1])) for audio in mels]
        ),
        key: torch.cat(pixels),
        grids: torch.tensor([grid] * len(samples)),
    }
    if kind == "video":
        inputs |= {"video_second_per_grid": torch.tensor([1.5] * len(samples)), "use_audio_in_video": True}
    return inputs


def generate(model, inputs):
    return model.generate(**inputs, max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True)


@every_family
@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("method", ["divprune", "mmtok", "fastv"])
def test_audio_stays(name, kind, method):
    """A padded batch gives each sample what it gets without the dropped tokens, and these are visual ones."""
    model = families.shared(name)
    inputs = inputs_of(model, kind, [0, 1, 2])
    with vtprune.prune(model, method, keep_ratio=0.5, positions="original") as session:
        output = generate(model, inputs)
    report, steps = session.report, torch.stack(output.logits, 1)
    assert report.keep_ratio < 0.6
    for sample in range(3):
        single = inputs_of(model, kind, [sample])
        ids = single["input_ids"][0]
        padding = inputs["input_ids"].shape[1] - len(ids)
        visual = torch.isin(ids, torch.tensor([IMAGE, VIDEO])).nonzero()[:, 0]
        assert (report.visual[sample] - padding).tolist() == visual.tolist()
        kept = [report.kept(sample, layer) - padding for layer in range(report.depth)]
        generated = output.sequences[sample, -NEW:]
        expected = recompute(model, single, generated[:-1], kept)[-NEW:]
        torch.testing.assert_close(steps[sample], expected, atol=ATOL, rtol=0)
        whole = recompute(model, single, generated[:-1], keep_all(model, single))[-NEW:]
        assert (whole - expected).abs().max() > 1e-2
        # The audio matters to the answer, or this would prove nothing.
        silent = recompute(model, single | {"input_features": 0 * single["input_features"]}, generated[:-1], kept)
        assert (silent[-NEW:] - expected).abs().max() > 1e-2


class Questions(vtprune.BeforeLLM):
    """Notes the question of every group, as mmtok and cdpruner read it."""

    name, signal = "questions_beside_audio", "text"

    def signals(self, shape):
        return (TextEmbeddings(),)

    def select(self, tokens):
        QUESTIONS.extend(tokens[TextEmbeddings()])
        return vtprune.Selection.of_indices(tokens, [torch.arange(k) for _, _, k in tokens.each()])


@every_family
@pytest.mark.parametrize("kind", ["image", "video"])
def test_audio_is_no_text(name, kind):
    model = families.shared(name)
    QUESTIONS.clear()
    with vtprune.prune(model, Questions(keep_ratio=0.5), strict=False):
        model(**inputs_of(model, kind, [0, 1, 2]))
    between = [6] if kind == "image" else []
    expected = [model.get_input_embeddings()(torch.tensor([*between, *text])) for text in TEXTS]
    frames = 1 if kind == "image" else FRAMES
    assert len(QUESTIONS) == 3 * frames
    for group, question in enumerate(QUESTIONS):
        assert torch.equal(question, expected[group // frames])


def test_a_whole_model_is_pruned_in_its_thinker():
    config = hf.Qwen3OmniMoeConfig(
        thinker_config=FAMILIES["qwen3_omni"].config().to_dict(), talker_config=None, enable_audio_output=False
    )
    whole = hf.Qwen3OmniMoeForConditionalGeneration(config).eval()
    thinker = families.shared("qwen3_omni")
    whole.thinker.load_state_dict(thinker.state_dict())
    inputs = inputs_of(thinker, "image", [1, 2])
    options = {"thinker_max_new_tokens": NEW, "thinker_eos_token_id": None, "return_audio": False}
    with vtprune.prune(thinker, "fastv", keep_ratio=0.5) as alone:
        expected = generate(thinker, inputs).sequences
    with vtprune.prune(whole, "fastv", keep_ratio=0.5) as session:
        got = whole.generate(**inputs, **options)
    assert torch.equal(got, expected)
    assert session.report.to_dict() == alone.report.to_dict()
    assert session.report.keep_ratio < 0.6
