# SPDX-License-Identifier: Apache-2.0
"""The plug-in for lmms-eval by itself: every family, its arguments, how answers are generated, cut and scored."""

import copy
import json
import sys
from pathlib import Path

import pytest
import tiny_video
import torch
from conformance import processors
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model

import vtprune
from vtprune.errors import BudgetError, ConfigError, NothingPrunedError
from vtprune.eval import digitscenes
from vtprune.eval.inputs import answers, conversation_inputs
from vtprune.eval.lmms.arguments import Arguments
from vtprune.eval.lmms.decoding import Generation, lengths, score_continuations
from vtprune.eval.lmms.model import VTPruneChat, VTPruneSimple
from vtprune.testing import families

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # PaliGemma's processor with NumPy 2

SCENES = str(digitscenes.MODEL_PATH)
GREEDY = {"max_new_tokens": 3, "do_sample": False}


def turn(text: str, *media) -> list[dict]:
    """A message as lmms-eval's tasks make it."""
    shown = [{"type": "video" if isinstance(one, str) else "image", "url": one} for one in media]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def ask(model: VTPruneChat, conversations: list, settings: dict = GREEDY, task: str = "task", padding: int = 0) -> list:
    """Answers of a chat model to conversations, as lmms-eval asks for them."""
    model.task_dict = {task: {"test": conversations}}
    requests = [
        Instance(
            "generate_until",
            ("", lambda document: document, copy.deepcopy(settings), index, task, "test"),
            0,
            {"task": task, "doc_id": index, "repeats": 1} | ({"__padding_only__": True} if index < padding else {}),
        )
        for index in range(len(conversations))
    ]
    return model.generate_until(requests)


def scenes(count: int) -> list:
    return [turn(example.question, example.image) for example in digitscenes.examples(limit=count)]


# -- every family -----------------------------------------------------------------------------------------------------


def save(family: str, folder: Path) -> str:
    """A tiny model and its processor as a checkpoint, with a chat template (PaliGemma has none)."""
    processor = copy.copy(processors.processor(family))
    marks = {"video": "", **processors._WRITTEN.get(family, processors._DEFAULT)}
    if "paligemma" not in family:
        processor.chat_template = (
            "{% for turn in messages %}{% for part in turn['content'] %}"
            f"{{{{ {json.dumps(marks)}[part['type']] if part['type'] != 'text' else part['text'] }}}} "
            "{% endfor %}{% endfor %}:"
        )
    families.shared(family).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


PICTURES = [
    turn("what is in this picture ?", processors.picture(50, 31)),
    turn("which one is bigger ? answer with a word", processors.picture(23, 60), processors.picture(41, 41)),
    turn("who are you ?"),
]


LEFT_OUT = (
    "cosmos3_edge",  # its processor leaves out token types, which its model needs, unless it is asked for them
    "fuyu",  # its processor takes one image a prompt, and writes no more into a prompt without one
    "got_ocr2",  # its processor takes no lists of several images, as batches have them
    "llama4",  # `generate()` of transformers 5.24 fails on it
)
NO_VIDEOS = ("nemotron_h_omni", "kimi_k25", "muse_glimmer", "exaone4_5", "hyperclovax_vision_v2")
"""Families of which it is not written down here how a prompt names a video; videos of the first come with one prompt
alone."""


@pytest.mark.parametrize("family", [family for family in processors._PROCESSORS if family not in LEFT_OUT])
def test_every_family(family, tmp_path):
    """Several images, none, and videos where the processor takes them: alone and in a batch, pruned and unpruned."""
    clips = [example.path for example in tiny_video.examples(2)]
    films = [turn("what happens ?", str(clips[0])), turn("compare what happens first ?", str(clips[1]))]
    asked = {"images": PICTURES[:2] if "paligemma" in family else PICTURES}
    folder = save(family, tmp_path)
    if hasattr(processors.processor(family), "video_processor") and family not in NO_VIDEOS:
        asked["videos"] = films
    for conversations in asked.values():
        one = VTPruneChat(pretrained=folder, method="divprune", keep_ratio=0.4, num_frames=4)
        found = [answer.token_counts.to_dict() for answer in ask(one, conversations)]
        alone = ask(one, conversations)
        together = ask(VTPruneChat(**{**one.arguments.model_dump(), "batch_size": 3}), conversations)
        assert [answer.text for answer in alone] == [answer.text for answer in together]
        kept = [answer.token_counts.to_dict()["kept"] for answer in together]
        assert kept == [costs["kept"] for costs in found]
        for conversation, costs in zip(conversations, found, strict=True):
            shows = len(conversation[0]["content"]) > 1
            assert (0 < costs["final_tokens"] < costs["visual_tokens"]) == shows
            assert costs["input_tokens"] > costs["visual_tokens"] and costs["output_tokens"] <= 3
        full = ask(VTPruneChat(pretrained=folder, batch_size=3, num_frames=4), conversations)
        assert all(
            a.token_counts.to_dict()["final_tokens"] == c["visual_tokens"] for a, c in zip(full, found, strict=True)
        )


@pytest.mark.parametrize("method", [None, "mmtok", "fastv"])
@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_every_sample_is_logged_with_its_own_cost(family, method, tmp_path):
    """In a batch with none, one and two images it has the numbers that it has alone."""
    conversations = [*PICTURES, turn("tell me who is in here ?", processors.picture(30, 30))]
    options = {"pretrained": save(family, tmp_path)} | ({} if method is None else {"method": method, "keep_ratio": 0.4})
    together, alone = (
        [answer.token_counts.to_dict() for answer in ask(VTPruneChat(**options, batch_size=size), conversations)]
        for size in (4, 1)
    )
    assert together == alone
    for costly in ("prefill_flops", "kv_bytes"):
        assert len({counts[costly] for counts in alone}) >= 3
        for counts in alone:
            saves = method is not None and counts["visual_tokens"] > 0
            assert (counts[costly] < counts[f"unpruned_{costly}"]) == saves
            assert (counts[costly] == counts[f"unpruned_{costly}"]) == (not saves)


# -- requests ---------------------------------------------------------------------------------------------------------


def test_lmms_eval_finds_the_plug_in():
    assert get_model("vtprune") is VTPruneChat
    assert get_model("vtprune", force_simple=True) is VTPruneSimple


def test_answers_come_in_order_whatever_shares_a_batch():
    """Settings that differ do not meet in a batch; requests made up for other processes are not run."""
    model = VTPruneChat(pretrained=SCENES, batch_size=4)
    conversations = scenes(5)
    texts = [answer.text for answer in ask(model, conversations)]
    expected = [example.answer for example in digitscenes.examples(limit=5)]
    assert sum(map(digitscenes.score, texts, expected)) >= 4
    model.clean()  # lmms-eval does this after every evaluation
    assert not hasattr(model, "model")
    padded = ask(model, conversations, padding=2)
    assert [answer.text for answer in padded] == ["", "", *texts[2:]]
    assert [answer.token_counts for answer in padded[:2]] == [None, None]
    spread = VTPruneChat(pretrained=SCENES, device="auto", dtype="float32", attention="eager")
    assert [answer.text for answer in ask(spread, conversations)] == texts
    short = ask(model, conversations, {"max_new_tokens": 1, "do_sample": False})
    assert {answer.token_counts.output_tokens for answer in short} == {1}


def test_a_pruned_run_that_pruned_nothing_is_an_error():
    model = VTPruneChat(pretrained=SCENES, method="divprune", keep_ratio=0.999)
    with pytest.raises(NothingPrunedError, match="288 visual tokens came, and none was dropped"):
        ask(model, scenes(2))
    assert ask(VTPruneChat(pretrained=SCENES, method="divprune", keep_ratio=1.0), scenes(1))


def test_what_a_task_must_not_show():
    model = VTPruneChat(pretrained=SCENES)
    with pytest.raises(ConfigError, match="shows videos, which LlavaProcessor does not take"):
        ask(model, [turn("what happens ?", "clip.mp4")])
    with pytest.raises(ConfigError, match="parts of type 'audio'"):
        ask(model, [[{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}]])
    with pytest.raises(ConfigError, match="parts of videos"):
        ask(model, [[{"role": "user", "content": [{"type": "video", "url": {"video_start": 1, "video": "clip.mp4"}}]}]])
    with pytest.raises(ConfigError, match="several rounds"):
        model.generate_until_multi_round([Instance("x", (), 0, {"task": "ovo", "doc_id": 0, "repeats": 1})])


def test_a_processor_that_takes_all_frames_needs_a_number(tmp_path):
    folder = save("llava_onevision", tmp_path)
    clip = str(tiny_video.examples(1)[0].path)
    with pytest.raises(ConfigError, match="give num_frames= or fps="):
        ask(VTPruneChat(pretrained=folder), [turn("what happens ?", clip)])
    (few,) = ask(VTPruneChat(pretrained=folder, num_frames=2), [turn("what happens ?", clip)])
    (more,) = ask(VTPruneChat(pretrained=folder, fps=4.0), [turn("what happens ?", clip)])
    assert few.token_counts.measured["visual_tokens"] < more.token_counts.measured["visual_tokens"]


def test_only_the_command_turns_errors_into_exit_codes(monkeypatch, capsys):
    with pytest.raises(ConfigError, match="unknown method 'mmtokk'"):
        VTPruneChat.create_from_arg_string(f"pretrained={SCENES},method=mmtokk,keep_ratio=0.5")
    monkeypatch.setitem(sys.modules, "lmms_eval.__main__", sys)  # lmms-eval's command is running
    with pytest.raises(SystemExit) as caught:
        VTPruneChat.create_from_arg_string(f"pretrained={SCENES},method=mmtokk,keep_ratio=0.5")
    assert caught.value.code == 2 and "error: unknown method 'mmtokk'" in capsys.readouterr().err
    model = VTPruneChat.create_from_arg_string(f"pretrained={SCENES}", {"batch_size": "2", "device": "cpu"})
    monkeypatch.setattr(model.model, "generate", lambda **_: 1 / 0)
    with pytest.raises(SystemExit) as caught:
        ask(model, scenes(1))
    assert caught.value.code == 1 and "ZeroDivisionError" in capsys.readouterr().err


# -- arguments --------------------------------------------------------------------------------------------------------


def test_methods_by_name_by_file_and_inline(tmp_path):
    file = tmp_path / "both.yaml"
    file.write_text("- {name: divprune, keep_ratio: 0.5}\n- {name: fastv, layer: 3, keep_ratio: 0.6}\n")
    inline = '[{"name": "divprune", "keep_ratio": 0.5}, {"name": "fastv", "layer": 3, "keep_ratio": 0.6}]'
    arguments = [{"method": f"@{file}"}, {"method": inline}]
    by_file, by_text = (Arguments.of({"pretrained": SCENES, **one}).methods() for one in arguments)
    assert by_file == by_text and [method.name for method in by_file] == ["divprune", "fastv"]
    (mmtok,) = Arguments.of({"pretrained": SCENES, "method": "mmtok", "keep_tokens": 16}).methods()
    assert mmtok == vtprune.build_method("mmtok", keep_tokens=16)
    assert [method.keep_ratio for method in Arguments.of({"pretrained": SCENES}).methods()] == [1.0]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"keepratio": 0.5}, "model_args: keepratio: unknown key; did you mean keep_ratio"),
        ({"pretrained": None}, "model_args: pretrained: "),
        ({"batch_size": "auto"}, "model_args: batch_size: "),
        ({"dtype": "int8"}, "model_args: dtype: .*float32"),
        ({"device": "gpu"}, "model_args: device: "),
        ({"num_frames": 8, "fps": 2}, "num_frames and fps: give one of them"),
        ({"processor_kwargs": "{a"}, "model_args: processor_kwargs: not valid JSON"),
        ({"method": "{a"}, "model_args: method: not valid JSON"),
        ({"keep_ratio": 0.5}, "keep_ratio without a method"),
        ({"method": "@nowhere.yaml"}, "nowhere.yaml: cannot be read"),
    ],
)
def test_wrong_arguments_are_named(given, problem):
    with pytest.raises(ConfigError, match=problem):
        Arguments.of({"pretrained": SCENES, **given}).methods()


def test_what_the_model_cannot_do_shows_before_any_data_is_loaded(monkeypatch):
    with pytest.raises(BudgetError, match="cannot go under 12.5%"):
        VTPruneChat(pretrained=SCENES, method="fastv", keep_ratio=0.01)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes .* ACCELERATE_USE_CPU=1"):
        VTPruneChat(pretrained=SCENES)


# -- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {}),
        ({"temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}, {"num_beams": 1}),
        ({"temperature": 0.2, "do_sample": False}, {}),
        ({"temperature": 0, "do_sample": True}, {}),
        ({"temperature": 0.5, "top_p": None}, {"temperature": 0.5, "do_sample": True}),
        ({"do_sample": True, "top_k": 5}, {"do_sample": True, "top_k": 5}),
        ({"max_new_tokens": 7, "image_aspect_ratio": "original"}, {"max_new_tokens": 7}),
    ],
)
def test_generation_settings(given, options):
    assert Generation.of(given, 99).options == {"max_new_tokens": 99, **options}


def test_stop_strings():
    cut = {"until": ["Q:", "\n", ""]}
    assert Generation.of(cut, 1).cut("a b\nQ: c") == "a b"
    assert Generation.of({"until": "b"}, 1).cut("a b c") == "a"
    assert Generation.of({"until": ["\n\n"]}, 1).cut("a\n\nb") == "a\n\nb"  # lmms-eval's filling, in every task


def test_lengths():
    model = VTPruneChat(pretrained=SCENES).model
    end, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    assert lengths(torch.tensor([[9, 8, end], [9, end, pad], [9, 8, 7]]), model) == [3, 2, 3]


# -- log-likelihoods --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, "mmtok"])
def test_log_likelihoods_are_those_of_the_model(method):
    """Against plain teacher forcing on the unpruned model; pruned, the likeliest word is what generation says."""
    lm = VTPruneChat(pretrained=SCENES, method=method, **({"keep_ratio": 0.3} if method else {}))
    model, processor = lm.model, lm.processor
    examples = digitscenes.examples(limit=4)
    words = ["7", "red", "blue", "yes", "two 2", examples[0].answer]
    turns = [
        [{"role": "user", "content": [{"type": "image", "image": e.image}, {"type": "text", "text": e.question}]}]
        for e in examples
    ]
    with vtprune.prune(model, lm.methods):
        (texts, _) = answers(model, processor, conversation_inputs(processor, turns), 1)
        for conversation, text in zip(turns, texts, strict=True):
            said = [*words, text]
            inputs = conversation_inputs(processor, [conversation] * len(said))
            scored = score_continuations(model, processor, inputs, said)
            assert scored[-1].greedy and scored[-1].loss == min(one.loss for one in scored if one.tokens == 1)
            assert all(one.greedy == (word == text) for one, word in zip(scored, said, strict=True) if one.tokens == 1)
            (single,) = score_continuations(model, processor, conversation_inputs(processor, [conversation]), ["two 2"])
            assert single.loss == pytest.approx(scored[4].loss, abs=1e-4) and single.tokens == 2
    if method is None:
        prompt = conversation_inputs(processor, turns[:1])
        own = processor.tokenizer("two 2", add_special_tokens=False, return_tensors="pt")["input_ids"]
        prompt["input_ids"] = torch.cat([prompt["input_ids"], own], 1)
        prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
        with torch.no_grad():
            logits = model(**prompt).logits[0, -3:-1].log_softmax(-1)
        expected = -logits.gather(1, own[0][:, None]).mean()
        first = score_continuations(model, processor, conversation_inputs(processor, turns[:1]), ["two 2"])[0]
        assert first.loss == pytest.approx(float(expected), abs=1e-4)


def test_an_empty_continuation_has_no_likelihood():
    lm = VTPruneSimple(pretrained=SCENES)
    lm.task_dict = {"task": {"test": [digitscenes.example(0)]}}
    arguments = ("what digit is red ?", "", lambda document: [document.image], 0, "task", "test")
    with pytest.raises(ConfigError, match="without a token"):
        lm.loglikelihood([Instance("loglikelihood", arguments, 0, {"task": "task", "doc_id": 0, "repeats": 1})])
