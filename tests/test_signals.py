# SPDX-License-Identifier: Apache-2.0
"""What methods are shown equals what eager attention with `output_attentions` computes."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from conformance import models
from conformance.models import IMAGE_TOKEN, batch_of_three, prompts
from transformers import AutoModelForImageTextToText, AutoTokenizer

import vtprune
from vtprune.errors import ConfigError, UnsupportedStageError
from vtprune.eval import digitscenes
from vtprune.methods.dart import KeyNorms, NormedStates
from vtprune.methods.glsim import ClsSimilarity
from vtprune.methods.sparsevlm import RaterAttention
from vtprune.methods.transprune import Transition
from vtprune.ops.similarity import similarity_to
from vtprune.signals import (
    AttentionReceived,
    ClsAttention,
    EncoderFeatures,
    EncoderKeys,
    InstructionAttention,
    LastQueryAttention,
    TextEmbeddings,
)
from vtprune.tokens import Selection
from vtprune.transformers_private import CACHE

SEEN: list = []


@dataclass(frozen=True, kw_only=True)
class BeforeProbe(vtprune.BeforeLLM):
    name: ClassVar[str] = "before_probe"
    signal: ClassVar[str] = "-"
    requests: tuple = ()

    def budgets(self, lengths, images):
        return torch.full_like(lengths, -1)

    def signals(self, shape):
        return self.requests

    def select(self, tokens):
        SEEN.append((tokens, {request: tokens[request] for request in self.requests}))
        keep = tokens.valid.clone()
        keep[:, 0] = False
        return Selection(keep)


@dataclass(frozen=True, kw_only=True)
class InsideProbe(vtprune.InLLM):
    name: ClassVar[str] = "inside_probe"
    signal: ClassVar[str] = "-"
    needs_budget: ClassVar[bool] = False
    requests: tuple = ()
    layers: tuple[int, ...] = (2,)

    def cuts(self, shape):
        return self.layers

    def budgets(self, shape, entering, images):
        return torch.stack([entering // (2 + i) for i in range(len(self.layers))])

    def signals(self, shape):
        return self.requests

    def select(self, tokens):
        SEEN.append((tokens, {request: tokens[request] for request in self.requests}))
        order = torch.arange(tokens.valid.shape[1])
        return Selection(tokens.valid & (order < tokens.budget[:, None]))


@pytest.fixture(autouse=True)
def _fresh():
    SEEN.clear()
    with torch.no_grad():
        yield


def run(model, batch, method, **options):
    with vtprune.prune(model, method, **options) as session:
        model(**batch.inputs())
    return session.report


def visual_columns(inputs):
    return [row.nonzero()[:, 0] for row in inputs["input_ids"] == IMAGE_TOKEN]


@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_cls_rows_and_encoder_features(name):
    model, eager = models.shared(name), models.shared(name, "eager")
    batch = batch_of_three(model)
    layers = (1, 3)
    run(model, batch, BeforeProbe(keep_ratio=0.9, requests=(ClsAttention(layers), EncoderFeatures())))
    tokens, signals = SEEN[0]
    pixels = batch.inputs()["pixel_values"]
    tower = eager.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
    expected = torch.stack([tower.attentions[layer][:, :, 0, 1:] for layer in layers], 1)
    torch.testing.assert_close(signals[ClsAttention(layers)], expected, atol=1e-5, rtol=0)
    chosen = model.config.vision_feature_layer
    chosen = [chosen] if isinstance(chosen, int) else chosen
    features = torch.cat([tower.hidden_states[layer][:, 1:] for layer in chosen], -1)
    torch.testing.assert_close(signals[EncoderFeatures()], features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        tokens.features, torch.stack(model.get_image_features(pixels).pooler_output), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", ["mha", "siglip"])
def test_attention_received_in_the_encoder(name):
    """With a CLS token its query counts among the rows, and what it receives is left out."""
    model, eager = models.shared(name), models.shared(name, "eager")
    batch = batch_of_three(model)
    request = AttentionReceived(2)
    run(model, batch, BeforeProbe(keep_ratio=0.9, requests=(request,)))
    _, signals = SEEN[0]
    attention = eager.model.vision_tower(batch.inputs()["pixel_values"], output_attentions=True).attentions[2]
    expected = attention.mean((1, 2))[:, int(name == "mha") :]
    torch.testing.assert_close(signals[request], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["mha", "siglip"])
def test_keys_in_the_encoder(name):
    model, eager = models.shared(name), models.shared(name, "eager")
    batch = batch_of_three(model)
    request, seen = EncoderKeys(1), []
    run(model, batch, BeforeProbe(keep_ratio=0.9, requests=(request,)))
    _, signals = SEEN[0]
    attention = eager.model.vision_tower.encoder.layers[1].self_attn
    watch = attention.k_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    eager.model.vision_tower(batch.inputs()["pixel_values"])
    watch.remove()
    torch.testing.assert_close(signals[request], seen[0][:, int(name == "mha") :], atol=1e-5, rtol=0)


@pytest.mark.parametrize("metric", ["cosine", "l1", "l2"])
def test_similarity_to_the_cls_token(metric):
    model, eager = models.shared("mha"), models.shared("mha", "eager")
    batch = batch_of_three(model)
    request = ClsSimilarity(metric)
    run(model, batch, BeforeProbe(keep_ratio=0.9, requests=(request,)))
    tokens, signals = SEEN[0]
    tower = eager.model.vision_tower(batch.inputs()["pixel_values"], output_hidden_states=True)
    # hidden state 0 goes into the first layer
    states = tower.hidden_states[tokens.shape.feature_layer + 1]
    expected = similarity_to(states[:, 0], states[:, 1:], metric)
    assert expected.shape == tokens.valid.shape and expected.std() > 1e-3
    torch.testing.assert_close(signals[request], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mha", "gqa", "siglip"])
def test_attention_rows_inside_the_llm(name):
    model, eager = models.shared(name), models.shared(name, "eager")
    batch = batch_of_three(model)
    inputs = batch.inputs()
    last, question, end = LastQueryAttention(1), InstructionAttention(), InstructionAttention(last_only=True)
    run(model, batch, InsideProbe(requests=(last, question, end)))
    _, signals = SEEN[0]
    attentions = eager(**inputs, output_attentions=True).attentions
    for sample, columns in enumerate(visual_columns(inputs)):
        n = len(columns)
        expected = attentions[1][sample, :, -1, columns]
        torch.testing.assert_close(signals[last][sample, :, :n], expected, atol=1e-5, rtol=0)
        rows = slice(int(columns[-1]) + 1, None)
        expected = attentions[2][sample].mean(0)[rows][:, columns].mean(0)
        torch.testing.assert_close(signals[question][sample, :n], expected, atol=1e-5, rtol=0)
        expected = attentions[2][sample, :, -1, columns].mean(0)
        torch.testing.assert_close(signals[end][sample, :n], expected, atol=1e-5, rtol=0)
        assert not signals[question][sample, n:].any()


@pytest.mark.parametrize("name", ["mha", "gqa", "siglip"])
def test_normed_states_and_lengths_of_keys(name):
    """Keys as the cache of the unpruned model holds them; the last prompt ends with its image."""
    model = models.shared(name)
    batch = prompts(model, "tItttt", "ttIttItttttt", "ttI")
    inputs = batch.inputs()
    run(model, batch, InsideProbe(requests=(NormedStates(), KeyNorms())))
    (states, text_states), (norms, text_norms) = SEEN[0][1].values()
    plain = model(**inputs, use_cache=True, output_hidden_states=True)
    expected = model.model.language_model.norm(plain.hidden_states[2])
    lengths = plain[CACHE].layers[1].keys.abs().sum((1, 3))
    for sample, columns in enumerate(visual_columns(inputs)):
        n, text = len(columns), slice(int(columns[-1]) + 1, None)
        torch.testing.assert_close(states[sample, :n], expected[sample, columns], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(norms[sample, :n], lengths[sample, columns], atol=1e-3, rtol=1e-4)
        real = text_norms[sample] >= 0
        assert int(real.sum()) == [4, 6, 0][sample]
        torch.testing.assert_close(text_states[sample, real], expected[sample, text], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(text_norms[sample, real], lengths[sample, text], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_attention_of_raters(name):
    """Raters are found among the text of the first layer; the last prompt ends with its image."""
    model, eager = models.shared(name), models.shared(name, "eager")
    batch = prompts(model, "tItttt", "ttIttItttttt", "ttI")
    inputs, plain, plus = batch.inputs(), RaterAttention(), RaterAttention(undo_rotation=True)
    run(model, batch, InsideProbe(requests=(plain, plus), layers=(2,)))
    _, signals = SEEN[0]
    output = eager(**inputs, output_attentions=True, output_hidden_states=True)
    length, text_config = inputs["input_ids"].shape[1], model.config.text_config
    rotary = model.model.language_model.rotary_emb
    counts = []
    for sample, columns in enumerate(visual_columns(inputs)):
        rows = torch.arange(length)[int(columns[-1]) + 1 :]
        rows = rows if len(rows) else torch.tensor([length - 1])
        states = output.hidden_states[0][sample]
        votes = (states[columns] @ states[rows].T).softmax(-1).mean(0)
        raters = rows[votes > votes.mean()] if len(rows) > 1 else rows
        counts.append(len(raters))
        weights = output.attentions[1][sample][:, raters][..., columns]
        torch.testing.assert_close(signals[plain][sample, :, : len(columns)], weights.mean(1), atol=1e-5, rtol=0)
        # Padding on the left, which positions leave out.
        distance = raters[:, None] - columns
        half = rotary(states[None], distance.flatten()[None])[0].view(*distance.shape, -1)
        # ones . R(distance) ones: each pair of dimensions gives twice the cosine of its angle
        logits = half.sum(-1) * half.shape[-1] ** -0.5
        expected = (weights / logits).mean(1)
        torch.testing.assert_close(signals[plus][sample, :, : len(columns)], expected, atol=1e-4, rtol=1e-3)
    assert text_config.head_dim == half.shape[-1]
    assert 0 < counts[0] < 4 and 0 < counts[1] < 6 and counts[2] == 1


def test_attention_rows_on_a_kept_cache_share_their_mass_with_it():
    """In a second turn the softmax runs over what the cache holds, too (layer 1 lies before the cut: all of it)."""
    model, eager = models.shared("gqa"), models.shared("gqa", "eager")
    first, second = prompts(model, "ttItt"), prompts(model, "ItttI", seed=1)
    joined = torch.cat([first.ids[0], second.ids[0]])[None]
    with vtprune.prune(model, InsideProbe(requests=(LastQueryAttention(1),), layers=(2,))):
        cache = model(**first.inputs() | {"use_cache": True})[CACHE]
        cached = cache.layers[1].keys.shape[2]
        model(
            input_ids=second.ids[0][None],
            pixel_values=second.images[0],
            attention_mask=torch.ones(1, joined.shape[1], dtype=torch.long),
            **{CACHE: cache},
        )
    _, signals = SEEN[-1]
    pixels = torch.cat([first.images[0], second.images[0]])
    attentions = eager(input_ids=joined, pixel_values=pixels, output_attentions=True).attentions
    columns = (second.ids[0] == IMAGE_TOKEN).nonzero()[:, 0] + cached
    expected = attentions[1][0, :, -1, columns]
    torch.testing.assert_close(signals[LastQueryAttention(1)][0], expected, atol=1e-5, rtol=0)


def test_transitions_accumulate_over_cuts():
    model = models.shared("mha")
    batch = batch_of_three(model)
    request = Transition((0, 1, 2, 3))
    run(model, batch, InsideProbe(requests=(request,), layers=(2, 4)))
    (early, first), (late, second) = SEEN
    assert early.layer == 2 and late.layer == 4
    kept = second[request].shape[1]
    # The probe keeps the first half: what was measured before the cut stays with its token and grows.
    before = first[request][:, :kept].masked_fill(~late.valid, 0)
    assert bool((second[request] >= before).all()) and bool((second[request] > before).any())


def test_the_question_is_read_after_the_image():
    """All text is read where none follows, as in the last prompt."""
    model = models.shared("gqa")
    batch = prompts(model, "ttItttt", "tItIttt", "tttI")
    request = TextEmbeddings()
    run(model, batch, BeforeProbe(keep_ratio=0.9, requests=(request,)))
    embed = model.get_input_embeddings()
    per_image = (
        batch.ids[0][-4:],
        batch.ids[1][-29:],
        batch.ids[1][-3:],
        batch.ids[2][1:4],
    )
    for got, ids in zip(SEEN[0][1][request], per_image, strict=True):
        torch.testing.assert_close(got, embed(ids[ids != IMAGE_TOKEN]))


def test_text_given_to_the_session_replaces_the_prompts():
    model = models.shared("gqa")
    batch = batch_of_three(model)
    probe = BeforeProbe(keep_ratio=0.9, requests=(TextEmbeddings(),))
    questions = [torch.tensor([5, 6]), torch.tensor([7]), torch.tensor([8, 9, 10])]
    run(model, batch, probe, text=questions)
    got = SEEN[0][1][TextEmbeddings()]
    assert [len(rows) for rows in got] == [2, 1, 1, 3]  # the second prompt holds two images
    torch.testing.assert_close(got[3], model.get_input_embeddings()(questions[2]))
    with pytest.raises(ConfigError, match="2 questions for 3 samples"):
        run(model, batch, probe, text=questions[:2])
    with pytest.raises(ConfigError, match="no tokenizer could be loaded"):
        run(model, batch, probe, text="how many?")


def test_image_features_from_elsewhere_are_refused_where_the_encoder_is_read():
    model = models.shared("gqa")
    batch = prompts(model, "tItt")
    inputs = batch.inputs()
    outputs = model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    for method in ("mmtok", "vtc_cls"):
        with vtprune.prune(model, method, keep_ratio=0.5), pytest.raises(UnsupportedStageError, match="elsewhere"):
            model(**inputs, mm_encoder_outputs={"image": outputs})
    with vtprune.prune(model, "divprune", keep_ratio=0.5) as session:
        model(**inputs, mm_encoder_outputs={"image": outputs})
    assert session.report.keep_ratio < 0.6


def test_text_given_as_a_string_is_tokenized_by_the_checkpoints_tokenizer():
    model = AutoModelForImageTextToText.from_pretrained(digitscenes.MODEL_PATH)
    tokenizer = AutoTokenizer.from_pretrained(digitscenes.MODEL_PATH)
    image = model.config.image_token_id
    ids = torch.tensor([[1, *[image] * 144, 5]])
    pixels = torch.randn(1, 3, 168, 168, generator=torch.Generator().manual_seed(0))
    for request, expected in (
        (TextEmbeddings(), "is there a red 7 ?"),
        (TextEmbeddings(keywords=True), "there red 7"),  # stop words and punctuation go
    ):
        probe = BeforeProbe(keep_ratio=0.9, requests=(request,))
        with vtprune.prune(model, probe, text="is there a red 7 ?"):
            model(input_ids=ids, pixel_values=pixels)
        wanted = torch.tensor(tokenizer(expected, add_special_tokens=False)["input_ids"])
        torch.testing.assert_close(SEEN[-1][1][request][0], model.get_input_embeddings()(wanted))
