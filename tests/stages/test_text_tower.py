# SPDX-License-Identifier: Apache-2.0
"""The question by the text tower of a CLIP, beside features of the model's own encoder in the space of both."""

import json
import sys
from types import SimpleNamespace

import open_clip
import pytest
import torch
import transformers as hf
from conformance import processors
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

import vtprune
from vtprune.ops.determinantal import conditional_diversity, scaled_relevance
from vtprune.ops.recoverable_compression import text_scores
from vtprune.signals import EncoderOutput, JointSpace
from vtprune.testing import configs, families

WORDS = ["what", "is", "in", "the", "picture", "where", "are", "they", "now"]
QUESTIONS = ["what is in the picture", "where are they", "now what is where in the picture"]
DIM = 12
END = 1


def tokenizer() -> hf.PreTrainedTokenizerFast:
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(["<s>", "<e>", *WORDS])}, unk_token="<e>"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(single="<s> $A <e>", special_tokens=[("<s>", 0), ("<e>", END)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<e>", pad_token="<e>")


def clip_of(model, **vision) -> hf.CLIPModel:
    """A CLIP whose vision tower has the weights of the model's."""
    text = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=20)
    text |= dict(max_position_embeddings=10, bos_token_id=0, eos_token_id=END, pad_token_id=END)
    config = hf.CLIPConfig(
        text_config=text, vision_config=model.config.vision_config.to_dict() | vision, projection_dim=DIM
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = hf.CLIPModel(config).eval()
        for parameter in clip.parameters():  # the initial embeddings hardly tell texts apart
            torch.nn.init.normal_(parameter, std=0.3)
    if not vision:
        tower = model.model.vision_tower.state_dict()
        clip.vision_model.load_state_dict({k.removeprefix("vision_model."): v for k, v in tower.items()})
    return clip


@pytest.fixture(scope="module")
def of_transformers(tmp_path_factory):
    """A source, and what the tower that it names makes of texts and of encoder features."""
    folder = tmp_path_factory.mktemp("clip")
    clip = clip_of(families.shared("llava"))
    clip.save_pretrained(folder)
    tokenizer().save_pretrained(folder)

    def texts(questions):
        alone = [tokenizer()(question, return_tensors="pt") for question in questions]
        return torch.cat([clip.get_text_features(**one).pooler_output for one in alone])

    return SimpleNamespace(source=str(folder), clip=clip, texts=texts, patches=clip.visual_projection)


@pytest.fixture(scope="module")
def of_open_clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    vision = dict(image_size=42, patch_size=7, layers=1, width=configs.WIDTH, head_width=8)
    text = dict(context_length=10, width=16, heads=2, layers=2)  # the vocabulary is that of open_clip's tokenizer
    config = dict(embed_dim=DIM, vision_cfg=vision, text_cfg=text)
    (folder / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.create_model("tiny-clip").eval()
        for parameter in clip.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    torch.save(clip.state_dict(), folder / "weights.pt")
    read = open_clip.get_tokenizer("tiny-clip")
    return SimpleNamespace(
        source=f"open_clip:tiny-clip@{folder / 'weights.pt'}",
        texts=lambda questions: torch.cat([clip.encode_text(read([question])) for question in questions]),
        patches=lambda features: features @ clip.visual.proj,
    )


class Spy(vtprune.Recoverable):
    """Notes what it is given."""

    name = "spy"

    def select(self, tokens):
        output, space = EncoderOutput(tokens.shape.encoder_layers - 1), JointSpace(self.text_tower)
        Spy.seen = tokens[output], *tokens[space]
        return super().select(tokens)


@torch.no_grad()
@pytest.mark.parametrize("library", ["of_transformers", "of_open_clip"])
@pytest.mark.parametrize("name", ["llava", "llava_next", "video_llava"])
def test_questions_and_tokens_are_in_the_space_of_the_clip(name, library, request):
    expected = request.getfixturevalue(library)
    model = families.shared(name)
    batch = families.batch(name, model)
    outputs = []
    tower = vtprune.adapter_for(model).vision_tower("image")
    watch = tower.encoder.layers[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
    with vtprune.prune(model, Spy(text_tower=expected.source), text=QUESTIONS, strict=False):
        model(**batch.inputs)
    watch.remove()
    output, questions, projection = Spy.seen
    # One a crop; tiles of an image, and images of a prompt, have one question.
    rows = torch.unique_consecutive(questions, dim=0)
    torch.testing.assert_close(rows, expected.texts(QUESTIONS))
    torch.testing.assert_close(output @ projection.T, expected.patches(output))
    if name == "llava":  # one crop an image, in order
        torch.testing.assert_close(output, outputs[0][:, 1:])


@torch.no_grad()
def test_scores_are_those_of_the_whole_clip(of_transformers):
    """The reference runs the CLIP beside the model, pictures and all."""
    model = families.shared("llava")
    inputs = families.batch("llava", model).singles[1]
    with vtprune.prune(model, Spy(text_tower=of_transformers.source), text=QUESTIONS[0], strict=False):
        model(**inputs)
    output, (question, _), projection = Spy.seen
    seen = of_transformers.clip.vision_model(inputs["pixel_values"]).last_hidden_state
    patches = of_transformers.clip.visual_projection(seen)[:, 1:]
    expected = torch.cosine_similarity(patches, of_transformers.texts(QUESTIONS[:1])[0], dim=-1) * DIM**-0.5
    torch.testing.assert_close(text_scores(question, output @ projection.T), expected)
    assert expected.std() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("layer", [-2, -1])
def test_cdpruner_takes_the_layer_that_is_read_to_the_space_of_the_clip(of_transformers, layer):
    """Through CLIP's last normalisation, whatever layer it is."""
    model = families.build("llava")
    model.config.vision_feature_layer = layer
    inputs = families.batch("llava", model).singles[0]
    clip = of_transformers.clip
    seen = clip.vision_model(inputs["pixel_values"], output_hidden_states=True).hidden_states[layer]
    norm = model.model.vision_tower.post_layernorm
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    patches = clip.visual_projection(norm(seen))[:, 1:]
    scores = -torch.cosine_similarity(patches, of_transformers.texts(QUESTIONS[:1])[0], dim=-1)
    valid = torch.ones_like(scores, dtype=torch.bool)
    features = torch.stack(tuple(model.get_image_features(inputs["pixel_values"]).pooler_output))
    expected = conditional_diversity(features, scaled_relevance(scores, valid), valid, torch.tensor([9]))
    with vtprune.prune(
        model, "cdpruner", text_tower=of_transformers.source, keep_tokens=9, text=QUESTIONS[0]
    ) as session:
        model(**inputs)
    kept = session.report.kept(0, 0) - session.report.visual[0][0]
    assert kept.tolist() == expected[0].nonzero()[:, 0].tolist()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["recoverable", "cdpruner"])
def test_a_batch_keeps_what_each_sample_keeps_alone(of_transformers, name, side):
    model = families.shared("llava")
    batch = families.batch("llava", model, padding_side=side)
    method = {"name": name, "keep_ratio": 0.3, "text_tower": of_transformers.source}
    with vtprune.prune(model, method, text=QUESTIONS) as session:
        logits = model(**batch.inputs).logits
        together = session.report
        for sample, alone in enumerate(batch.singles):
            session.text = QUESTIONS[sample]
            first, width = batch.first_column(sample), alone["input_ids"].shape[1]
            torch.testing.assert_close(
                model(**alone).logits[0], logits[sample, first : first + width], atol=1e-4, rtol=1e-4
            )
            assert together.kept(sample, 0).tolist() == (session.report.kept(0, 0) + first).tolist()


@torch.no_grad()
def test_the_question_decides_what_is_recovered(of_transformers):
    model = families.shared("llava")
    inputs = families.batch("llava", model).singles[0]
    kept = set()
    with vtprune.prune(
        model, "recoverable", text_tower=of_transformers.source, keep_tokens=20, outlier_factor=1.05
    ) as session:
        for session.text in QUESTIONS:
            model(**inputs)
            kept.add(tuple(session.report.kept(0, 0).tolist()))
    assert len(kept) > 1


@torch.no_grad()
def test_without_text_the_prompt_is_decoded(of_transformers, tmp_path):
    model = families.build("llava")
    batch = families.batch("llava", model)
    method = Spy(text_tower=of_transformers.source)
    with vtprune.prune(model, method, strict=False), pytest.raises(vtprune.ConfigError, match="pass text="):
        model(**batch.inputs)

    processors.processor("llava").tokenizer.save_pretrained(tmp_path)
    words = hf.AutoTokenizer.from_pretrained(tmp_path)
    ids = words(QUESTIONS[0], add_special_tokens=False, return_tensors="pt")["input_ids"]
    inputs = batch.singles[0]
    picture = (inputs["input_ids"][0] == families.IMAGE).nonzero()[:, 0]
    inputs["input_ids"] = torch.cat((inputs["input_ids"][:, : picture[-1] + 1], ids), dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    model.name_or_path = str(tmp_path)
    expected = of_transformers.texts(QUESTIONS[:1])
    for text in (None, ids[0], QUESTIONS[0]):
        with vtprune.prune(model, method, text=text, strict=False):
            model(**inputs)
        torch.testing.assert_close(Spy.seen[1], expected)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    given = {key: value for key, value in inputs.items() if key != "input_ids"}
    with vtprune.prune(model, method, strict=False), pytest.raises(vtprune.ConfigError, match="came as embeddings"):
        model(inputs_embeds=embeddings, **given)


@torch.no_grad()
def test_a_tower_is_loaded_once_a_model_and_draws_nothing(of_transformers, monkeypatch):
    model = families.build("llava")
    inputs = families.batch("llava", model).singles[0]
    loaded, load = [], hf.CLIPModel.from_pretrained
    monkeypatch.setattr(hf.CLIPModel, "from_pretrained", lambda *a, **k: loaded.append(a) or load(*a, **k))
    state = torch.get_rng_state()
    for question in QUESTIONS:
        with vtprune.prune(model, Spy(text_tower=of_transformers.source), text=question, strict=False):
            model(**inputs)
            model(**inputs)
    assert len(loaded) == 1
    assert torch.equal(state, torch.get_rng_state())


@torch.no_grad()
def test_a_tower_takes_the_dtype_of_the_model(of_transformers, of_open_clip):
    model = families.build("llava").bfloat16()
    inputs = families.batch("llava", model).singles[0]
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    for expected in (of_transformers, of_open_clip):
        with vtprune.prune(model, Spy(text_tower=expected.source), text=QUESTIONS[0], strict=False):
            model(**inputs)
        _, questions, projection = Spy.seen
        assert questions.dtype == projection.dtype == torch.bfloat16
        assert torch.cosine_similarity(questions.float(), expected.texts(QUESTIONS[:1])).min() > 0.99


@torch.no_grad()
def test_long_questions_are_cut_off(of_transformers):
    model = families.shared("llava")
    inputs = families.batch("llava", model).singles[0]
    features = []
    for words in (8, 30):
        with vtprune.prune(model, Spy(text_tower=of_transformers.source), text="now " * words, strict=False):
            model(**inputs)
        features.append(Spy.seen[1])
    torch.testing.assert_close(*features)


def test_encoders_that_are_no_clip_are_refused(of_transformers):
    for name in ("paligemma", "llava_onevision", "internvl"):
        model = families.shared(name)
        for method in ("recoverable", "cdpruner"):
            with pytest.raises(vtprune.UnsupportedStageError, match="needs a CLIP as vision encoder"):
                vtprune.prune(model, method, keep_tokens=5, text_tower=of_transformers.source)


@torch.no_grad()
def test_what_cannot_be_loaded_is_named(of_transformers, of_open_clip, tmp_path, monkeypatch):
    model = families.shared("llava")
    inputs = families.batch("llava", model).singles[0]

    def refused(source, match, **options):
        options = {"text": QUESTIONS[0]} | options
        with (
            vtprune.prune(model, "recoverable", text_tower=source, **options),
            pytest.raises(vtprune.ConfigError, match=match),
        ):
            model(**inputs)

    refused(str(tmp_path / "nowhere"), "no CLIP and tokenizer could be loaded from '.*nowhere'")
    towerless = tmp_path / "vision"
    hf.CLIPVisionModel(model.config.vision_config).save_pretrained(towerless)
    tokenizer().save_pretrained(towerless)
    refused(str(towerless), "is no whole CLIP, it lacks .* weights like")
    wider = tmp_path / "wider"
    clip_of(model, hidden_size=40).save_pretrained(wider)
    tokenizer().save_pretrained(wider)
    refused(str(wider), "width of 40, this model's encoder has 32")
    refused("open_clip:tiny-clip", "expected open_clip:NAME@WEIGHTS")
    refused("open_clip:tiny-clip@nowhere.pt", "expected open_clip:NAME@WEIGHTS")
    refused("open_clip:no-such-clip@nowhere.pt", "could not load")
    refused(of_transformers.source, "got 2 questions for 1 samples", text=QUESTIONS[:2])
    monkeypatch.setitem(sys.modules, "open_clip", None)
    refused(of_open_clip.source.replace("tiny-clip@", "tiny-clip@./"), r"pip install \"vtprune\[clip\]\"")
