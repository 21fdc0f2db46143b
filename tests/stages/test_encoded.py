# SPDX-License-Identifier: Apache-2.0
import functools
import zlib
from types import SimpleNamespace

import pytest
import torch

from vtprune.errors import UnsupportedStageError
from vtprune.signals import EncoderKeys, SampleKeys
from vtprune.stages.cutting import cut_sequence
from vtprune.stages.encoded import EncodedMedia, check_encoded, per_group
from vtprune.tokens import Grid, Medium, Selection

from .hand_made import SHAPE, adapter, call_of, encoding, ids_of, media_of, row_of

CROPPED = Medium.of_grids(Grid(1, 1), Grid(1, 2))
"""Two crops, of one token and of two."""


def call(**fields):
    """An image of two crops in the first sample, two images of two tokens each in the second one."""
    return call_of("tiiit.", "iitiit", encodings=[encoding(CROPPED, row_of(2), row_of(2))], **fields)


def cut(prompts, *places):
    groups = prompts.crop_groups()
    keep = torch.zeros_like(groups.valid)
    for group, kept in enumerate(places):
        keep[group, kept] = True
    cut_sequence(prompts, prompts.embeddings, groups, Selection(keep), 0, compact=False)


class Recorder:
    """Records of seven visual tokens: what is asked for of token n is n + 1."""

    def per_token(self, encodings, values):
        (one,) = encodings
        return values(one)[0]

    def projector_inputs(self, encodings):
        return torch.arange(1, 8)[:, None] * 10

    def image_keys(self, encoding):
        return [1000 * (number + 1) for number, _ in enumerate(encoding.media)]


def view(prompts, groups, text=None) -> EncodedMedia:
    return EncodedMedia(prompts, groups, Recorder(), text)


def test_values_of_encoded_tokens_are_shared_out_among_groups():
    prompts = call()
    values = torch.arange(1, 8)[:, None] * torch.tensor([1, 10])
    assert per_group(values, prompts, prompts.crop_groups())[..., 0].tolist() == [[1, 0], [2, 3], [4, 5], [6, 7]]
    assert per_group(values, prompts, prompts.crop_groups())[1].tolist() == [[2, 20], [3, 30]]
    assert per_group(values, prompts, prompts.image_groups())[..., 0].tolist() == [[1, 2, 3], [4, 5, 0], [6, 7, 0]]
    by_head = values[:, None, :].expand(-1, 4, -1)
    assert per_group(by_head, prompts, prompts.crop_groups())[0, :, 3].tolist() == [[1, 10], [0, 0]]
    flat = per_group(values[:, 0], prompts, prompts.crop_groups())
    assert flat.tolist() == [[1, 0], [2, 3], [4, 5], [6, 7]]


def test_only_tokens_that_are_left_have_values():
    prompts = call()
    cut(prompts, [0], [1], [], [0, 1])
    values = torch.arange(1, 8)
    assert per_group(values, prompts, prompts.crop_groups()).tolist() == [[1, 0], [3, 0], [0, 0], [6, 7]]


def test_signals_are_read_for_the_groups():
    prompts = call()
    (encoded,) = prompts.media.encodings
    encoded.keys[1] = torch.arange(1.0, 8)[None, :, None, None].expand(1, 7, 2, 3)
    read = view(prompts, prompts.crop_groups()).read(EncoderKeys(1))
    assert read.shape == (4, 2, 6) and read[..., 5].tolist() == [[1, 0], [2, 3], [4, 5], [6, 7]]
    assert view(prompts, prompts.crop_groups()).shape is SHAPE
    inputs = view(prompts, prompts.image_groups()).projector_inputs()
    assert inputs[..., 0].tolist() == [[10, 20, 30], [40, 50, 0], [60, 70, 0]]


def test_outputs_are_normalised_as_the_tower_does():
    tower = SimpleNamespace(post_layernorm=lambda output: output - 1)
    prompts = call(adapter=adapter(vision_tower=lambda: tower))
    assert view(prompts, None).normalised(torch.tensor([3.0])).tolist() == [2]


def test_the_sessions_text_goes_before_the_prompts():
    table = torch.nn.Embedding.from_pretrained(torch.arange(100.0)[:, None])
    prompts = call(adapter=adapter(base=SimpleNamespace(get_input_embeddings=lambda: table)))
    rows = view(prompts, prompts.crop_groups(), torch.tensor([7, 8])).text_embeddings(keywords=False)
    assert [row[:, 0].tolist() for row in rows] == [[7, 8]] * 4


def text_key(ids) -> int:
    return zlib.crc32(str(ids).encode())


def test_keys_depend_on_the_prompts_text_the_image_and_the_crop():
    prompts = call()
    first, second = text_key([10, 14]), text_key([12, 15])
    assert ids_of(["tiiit.", "iitiit"])[:, [0, 2, 4, 5]].tolist() == [[10, 90, 14, 0], [90, 12, 90, 15]]
    assert view(prompts, prompts.crop_groups()).read(SampleKeys()) == [
        first + 1000,
        first + 1000 + 7919,
        second + 2000,
        second + 3000,
    ]
    assert view(prompts, prompts.image_groups()).sample_keys() == [first + 1000, second + 2000, second + 3000]


def test_an_image_of_several_tiles_has_the_key_of_its_first():
    tiles = encoding(row_of(1), row_of(1), row_of(1))
    prompts = call_of("iitit", encodings=[tiles])
    prompts.media = media_of(["iitit"], tiles, tiles_adjoin=True)
    text = text_key([12, 14])
    assert view(prompts, prompts.image_groups()).sample_keys() == [text + 1000, text + 3000]


def test_beams_have_the_keys_of_their_prompt():
    prompts = call_of("tii", "tii", encodings=[encoding(row_of(2))])
    one, other = view(prompts, prompts.crop_groups()).sample_keys()
    assert one == other == text_key([10]) + 1000


def test_features_that_the_encoder_did_not_give_are_refused():
    check_encoded(call())
    unseen = call()
    unseen.media.encodings[0].inputs = None
    changed = call()
    changed.embeddings[0, 1] += 1
    for prompts in (unseen, changed):
        seen = view(prompts, prompts.crop_groups())
        for read in (seen.projector_inputs, functools.partial(seen.read, EncoderKeys(1))):
            with pytest.raises(UnsupportedStageError, match="computed elsewhere"):
                read()
