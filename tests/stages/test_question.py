# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from torch import nn

from vtprune.errors import ConfigError
from vtprune.stages import question
from vtprune.stages.question import joint_space, text_embeddings

from .hand_made import adapter, call_of, encoding, row_of

TABLE = nn.Embedding.from_pretrained(torch.arange(100.0)[:, None].repeat(1, 2))
"""The embedding of an id is the id, twice."""
BOS, END, PAD = 10, 16, 0
"""The first column of text, and the last of prompts of seven columns, have the ids of special tokens."""
PROJECTION = torch.zeros(3, 5)


class Words:
    """A tokenizer: a word's id is its length, and one more if it is given as a word by itself."""

    def __call__(self, text, is_split_into_words, add_special_tokens):
        assert not add_special_tokens
        words = text if is_split_into_words else text.split()
        return {"input_ids": [len(word) + is_split_into_words for word in words]}

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return " " + "-".join(map(str, ids)) + " "


class Tower:
    """A text tower that encodes a string as its length, and remembers what it was given."""

    projection = PROJECTION

    def __init__(self):
        self.strings = []

    def encode(self, strings):
        self.strings.append(strings)
        return torch.tensor([[float(len(string))] * 3 for string in strings])


@pytest.fixture
def tokenizer(monkeypatch):
    monkeypatch.setattr(question, "_tokenizer", lambda path: Words())


@pytest.fixture
def tower(monkeypatch):
    found = Tower()
    monkeypatch.setattr(question, "text_tower", lambda model, source, device, dtype: found)
    return found


FACTS = dict(
    base=SimpleNamespace(get_input_embeddings=lambda: TABLE),
    model=SimpleNamespace(name_or_path="a/checkpoint"),
    text_config=SimpleNamespace(bos_token_id=BOS, eos_token_id=[END, 99], pad_token_id=PAD),
    vision_config=SimpleNamespace(hidden_size=5),
)


def call(*prompts, lengths, **fields):
    """Prompts with images of so many tokens."""
    found = call_of(*prompts, encodings=[encoding(*map(row_of, lengths))], adapter=adapter(**FACTS), **fields)
    found.embeddings = TABLE(found.ids)
    return found


def ids_read(text, call, groups, keywords=False) -> list[list[int]]:
    return [rows[:, 0].int().tolist() for rows in text_embeddings(text, call, groups, keywords)]


def test_the_prompts_question_stands_behind_each_image():
    """Ids of text are 10 and the column; the first and the last are special ones."""
    prompts = call("tittt", "titit", lengths=(1, 1, 1))
    assert ids_read(None, prompts, prompts.crop_groups()) == [[12, 13, 14], [12, 14], [14]]


def test_special_tokens_and_padding_are_no_question():
    prompts = call("tiitttt", "..titit", lengths=(2, 1, 1))
    assert ids_read(None, prompts, prompts.image_groups()) == [[13, 14, 15], [14], [12, 14]]


def test_what_stands_around_images_is_no_question():
    prompts = call("tt<i<tt", lengths=(1,))
    assert ids_read(None, prompts, prompts.crop_groups()) == [[15]]


def test_all_text_is_read_where_none_follows():
    prompts = call("tttti", lengths=(1,))
    assert ids_read(None, prompts, prompts.crop_groups()) == [[11, 12, 13]]


def test_an_answer_is_no_question():
    prompt = torch.tensor([[True] * 4 + [False]])
    prompts = call("tittt", lengths=(1,), prompt=prompt)
    assert ids_read(None, prompts, prompts.crop_groups()) == [[12, 13]]


def test_without_ids_nothing_is_known_to_be_special():
    prompts = call_of("tittt", encodings=[encoding(row_of(1))], adapter=adapter(**FACTS), ids=None)
    rows = text_embeddings(None, prompts, prompts.crop_groups(), False)
    assert [len(row) for row in rows] == [3]
    first = call_of("tttti", encodings=[encoding(row_of(1))], adapter=adapter(**FACTS), ids=None)
    assert [len(row) for row in text_embeddings(None, first, first.crop_groups(), False)] == [4]


def test_one_question_for_all_and_one_for_each_sample():
    prompts = call("tittt", "titit", lengths=(1, 1, 1))
    groups = prompts.crop_groups()
    assert ids_read(torch.tensor([7, 8]), prompts, groups) == [[7, 8]] * 3
    assert ids_read([torch.tensor([7, 8]), torch.tensor([9])], prompts, groups) == [[7, 8], [9], [9]]
    for count in (3, 4):
        with pytest.raises(ConfigError, match=f"got {count} questions for 2 samples"):
            ids_read([torch.tensor([1])] * count, prompts, groups)


def test_beams_share_the_question_of_their_sample():
    prompts = call("tit", "tit", "itt", "itt", lengths=(1, 1))
    assert prompts.media.copies == 2
    questions = [torch.tensor([7]), torch.tensor([8])]
    assert ids_read(questions, prompts, prompts.sample_groups()) == [[7], [7], [8], [8]]


def test_strings_are_tokenized(tokenizer):
    prompts = call("tittt", lengths=(1,))
    groups = prompts.crop_groups()
    assert ids_read("is there a dog", prompts, groups) == [[2, 5, 1, 3]]
    assert ids_read("is there a dog", prompts, groups, keywords=True) == [[6, 4]], "words by themselves, no stop words"


def test_a_tokenizer_that_cannot_be_loaded_is_named(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # asks no hub again and again
    prompts = call("tittt", lengths=(1,))
    with pytest.raises(ConfigError, match="no tokenizer could be loaded from the model's checkpoint 'a/checkpoint'"):
        ids_read("a dog", prompts, prompts.crop_groups())


# -- the text tower -----------------------------------------------------------------------------------------------


def test_the_tower_reads_strings_as_they_are(tower):
    prompts = call("tittt", "titit", lengths=(1, 1, 1))
    rows, projection = joint_space(["dog", "a cat"], prompts, prompts.crop_groups(), "a tower")
    assert tower.strings == [["dog", "a cat"]] and rows[:, 0].tolist() == [3, 5, 5]
    assert projection is PROJECTION


def test_the_tower_reads_ids_decoded(tower, tokenizer):
    prompts = call("tittt", "titit", lengths=(1, 1, 1))
    joint_space(torch.tensor([4, 5]), prompts, prompts.crop_groups(), "a tower")
    assert tower.strings.pop() == ["4-5"]
    rows, _ = joint_space(None, prompts, prompts.crop_groups(), "a tower")
    assert tower.strings == [["12-13-14", "12-14", "14"]] and rows[:, 0].tolist() == [8, 5, 2]


def test_the_tower_needs_the_prompts_ids_or_a_question(tower):
    prompts = call_of("tittt", encodings=[encoding(row_of(1))], adapter=adapter(**FACTS), ids=None)
    with pytest.raises(ConfigError, match="the prompt came as embeddings"):
        joint_space(None, prompts, prompts.crop_groups(), "a tower")
    assert len(joint_space("dog", prompts, prompts.crop_groups(), "a tower")[0]) == 1


def test_a_tower_of_another_encoder_is_refused(tower):
    tower.projection = torch.zeros(3, 4)
    prompts = call("tittt", lengths=(1,))
    with pytest.raises(ConfigError, match="has a width of 4, this model's encoder has 5"):
        joint_space("dog", prompts, prompts.crop_groups(), "a tower")
