# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vtprune.errors import UnsupportedStageError
from vtprune.tokens import Grid, Medium

from .hand_made import columns_of, encoding, media_of, row_of, with_newlines

TILED = Medium.of_grids(Grid(1, 1), Grid(1, 2))
"""Two crops, of one token and of two."""


def test_each_column_has_its_crop_its_image_and_its_encoded_token():
    media = media_of([".tiiit", "iitiit"], encoding(TILED, row_of(2), row_of(2)))
    assert media.labels.tolist() == [[-1, -1, 0, 1, 1, -1], [2, 2, -1, 3, 3, -1]]
    assert media.images.tolist() == [[-1, -1, 0, 0, 0, -1], [1, 1, -1, 2, 2, -1]]
    assert media.tokens.tolist() == [[0, 0, 0, 1, 2, 0], [3, 4, 0, 5, 6, 0]]
    assert media.visual.tolist() == columns_of([".tiiit", "iitiit"], "i").tolist()


def test_each_crop_has_its_sample_image_medium_and_number():
    media = media_of([".tiiit", "iitiit"], encoding(TILED, row_of(2), row_of(2)))
    assert media.crop_rows.tolist() == [0, 0, 1, 1] and media.crops_per_sample.tolist() == [2, 2]
    assert media.crop_images.tolist() == media.crop_media.tolist() == [0, 0, 1, 2]
    assert media.crop_ranks.tolist() == [0, 1, 0, 0]
    assert media.grids == (Grid(1, 1), Grid(1, 2), Grid(1, 2), Grid(1, 2))
    assert media.image_rows.tolist() == [0, 1, 1] and media.image_media.tolist() == [0, 1, 2]
    assert media.copies == 1


def test_videos_are_numbered_behind_all_images():
    media = media_of(["vvti", "vtii"], encoding(row_of(1), row_of(2)), encoding(row_of(2), row_of(1), kind="video"))
    assert media.images.tolist() == [[2, 2, -1, 0], [3, -1, 1, 1]]
    assert media.tokens.tolist() == [[3, 4, 0, 0], [5, 0, 1, 2]]
    assert media.kinds == ("image", "image", "video", "video")
    assert media.crop_rows.tolist() == [0, 1, 0, 1]


def test_a_sample_without_media_has_no_crops():
    media = media_of(["tttt", "tiit"], encoding(row_of(2)))
    assert media.crops_per_sample.tolist() == [0, 1] and media.image_rows.tolist() == [1]


def test_separators_belong_to_an_image_and_to_no_crop():
    """Lines are numbered through all images."""
    media = media_of(["iiitiiiiii"], encoding(with_newlines(1, 2), with_newlines(2, 2)))
    assert media.labels.tolist() == [[0, 0, -1, -1, 1, 1, -1, 1, 1, -1]]
    assert media.images.tolist() == [[0, 0, 0, -1, 1, 1, 1, 1, 1, 1]]
    assert media.lines.tolist() == [[0, 0, 0, -1, 1, 1, 1, 2, 2, 2]]


def test_beams_have_crops_and_images_of_their_own_and_share_the_encoded_tokens():
    media = media_of(["tii", "tii", "iti", "iti"], encoding(row_of(2), row_of(1), row_of(1)))
    assert media.copies == 2
    assert media.labels.tolist() == [[-1, 0, 0], [-1, 3, 3], [1, -1, 2], [4, -1, 5]]
    assert media.tokens.tolist() == [[0, 0, 1], [0, 0, 1], [2, 0, 3], [2, 0, 3]]
    assert media.crop_rows.tolist() == [0, 2, 2, 1, 3, 3]
    assert media.crop_images.tolist() == [0, 1, 2, 3, 4, 5] and media.crop_media.tolist() == [0, 1, 2] * 2
    assert media.image_rows.tolist() == [0, 2, 2, 1, 3, 3] and media.image_media.tolist() == [0, 1, 2] * 2
    assert len(media.grids) == len(media.kinds) == 6


def test_tiles_side_by_side_are_one_image_where_the_family_says_so():
    tiles = encoding(row_of(1), row_of(2), row_of(1))
    apart = media_of(["iiiti"], tiles)
    assert apart.images.tolist() == [[0, 1, 1, -1, 2]]
    adjoining = media_of(["iiiti"], tiles, tiles_adjoin=True)
    assert adjoining.images.tolist() == [[0, 0, 0, -1, 1]] and adjoining.labels.tolist() == [[0, 1, 1, -1, 2]]
    assert adjoining.crop_images.tolist() == [0, 0, 1] and adjoining.image_media.tolist() == [0, 2]
    assert adjoining.kinds == ("image", "image")


def test_tiles_of_two_samples_never_adjoin():
    media = media_of(["ti", "it"], encoding(row_of(1), row_of(1)), tiles_adjoin=True)
    assert media.images.tolist() == [[-1, 0], [1, -1]]


@pytest.mark.parametrize(
    "prompts, lengths, message",
    [
        (["tii", "tii"], [3], "3 image tokens were encoded, but"),
        (["tii", "tii", "iii", "tit"], [2, 2], "4 image tokens were encoded, but"),  # two copies, and not alike
        (["tii", "tit"], [1, 2], "do not end where"),  # a medium reaches into the next sample
    ],
)
def test_prompts_that_do_not_hold_what_was_encoded_are_refused(prompts, lengths, message):
    with pytest.raises(UnsupportedStageError, match=message):
        media_of(prompts, encoding(*map(row_of, lengths)))


def test_kinds_that_differ_in_their_copies_are_refused():
    with pytest.raises(UnsupportedStageError, match="different numbers of samples"):
        media_of(["iv", "iv"], encoding(row_of(1)), encoding(row_of(1), row_of(1), kind="video"))


def test_prompts_without_a_kind_say_nothing_of_copies():
    nothing = encoding(kind="video")
    nothing.pooled = torch.empty(0, 2)
    media = media_of(["tii", "tii"], encoding(row_of(2)), nothing)
    assert media.copies == 2


def test_embeddings_are_compared_with_what_was_encoded():
    prompts = ["tiit", "iitt"]
    media = media_of(prompts, encoding(row_of(2), row_of(2)))
    embeddings = torch.zeros(2, 4, 2)
    embeddings[0, 1:3] = torch.tensor([[1.0, -1], [2, -2]])
    embeddings[1, 0:2] = torch.tensor([[3.0, -3], [4, -4]])
    assert media.holds(embeddings)
    assert media.holds(embeddings + (~media.visual)[..., None])
    assert not media.holds(embeddings.flip(0))
    embeddings[1, 1, 0] = 5
    assert not media.holds(embeddings)
