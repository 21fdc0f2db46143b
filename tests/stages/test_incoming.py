# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from vtprune.errors import ConfigError, UnsupportedStageError, VTPruneError
from vtprune.stages.cache import Owner
from vtprune.stages.incoming import Behind, Columns, Incoming, check_traced, open_call
from vtprune.transformers_private import CACHE, cache_of

from .hand_made import CONFIG, DEPTH, IDS, adapter, columns_of, empty_cache, encoding, fill, ids_of, row_of

REAL = columns_of(["..tttttt", "tttttttt"], "t")
"""Two samples of 6 and 8 tokens, padded on the left."""


def prompt(behind: Behind, real=REAL) -> list[int]:
    """How many of each sample's tokens are prompt, which comes first."""
    found = behind.prompt(real)
    for row, tokens in zip(found, real, strict=True):
        assert torch.equal(row, tokens & (tokens.cumsum(0) <= row.sum()))
    return found.sum(1).tolist()


def test_everything_is_prompt_unless_told_otherwise():
    assert prompt(Behind()) == [6, 8]


@pytest.mark.parametrize("length, expected", [(4, [4, 4]), ([3, 5], [3, 5]), (torch.tensor([1, 99]), [1, 8])])
def test_prompt_lengths_count_without_padding(length, expected):
    assert prompt(Behind(prompt_length=length)) == expected
    assert prompt(Behind(prompt_length=length), REAL.flip(1)) == expected  # padded on the right


@pytest.mark.parametrize("length", [0, [3, -1], [1, 2, 3]])
def test_prompt_lengths_that_do_not_fit_are_refused(length):
    with pytest.raises(ConfigError, match="prompt_length"):
        Behind(prompt_length=length).prompt(REAL)


def learnt(*spans) -> torch.Tensor:
    """Labels of two samples: -100 but for the columns from and to which is learnt."""
    labels = torch.full((2, 8), -100)
    for row, (start, stop) in enumerate(spans):
        labels[row, start:stop] = 7
    return labels


def test_the_prompt_ends_before_the_first_label():
    assert prompt(Behind(labels=learnt((5, 8), (6, 7)))) == [3, 6]


def test_labels_from_the_first_token_on_and_none_at_all_say_nothing():
    assert prompt(Behind(labels=learnt((2, 8), (1, 8)))) == [6, 8]
    assert prompt(Behind(labels=learnt((0, 0), (2, 8)))) == [6, 2]
    padding = learnt((6, 8), (7, 8))
    padding[0, :2] = 0
    assert prompt(Behind(labels=padding)) == [4, 7]


@pytest.mark.parametrize(
    "asked, expected",
    [
        (1, [6, 8]),
        (3, [4, 6]),  # the prompt's last column, and two behind it
        (torch.tensor([5, 6, 7]), [4, 6]),
        (torch.tensor([-3, -2, -1]), [4, 6]),
        (torch.tensor([4, 6, 7]), [6, 8]),  # not the last columns
        (torch.arange(9), [6, 8]),  # more than there are
    ],
)
def test_logits_asked_for_say_where_the_prompt_ends(asked, expected):
    assert prompt(Behind(logits_to_keep=asked)) == expected


def test_what_is_said_outright_goes_before_labels_and_these_before_logits():
    labels = learnt((5, 8), (5, 8))
    assert prompt(Behind(2, labels, 4)) == [2, 2]
    assert prompt(Behind.of({"labels": labels, "logits_to_keep": 2}, None)) == [3, 5]
    assert prompt(Behind.of({"logits_to_keep": 2}, None)) == [5, 7]


# -- what was passed ----------------------------------------------------------------------------------------------


PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def stated(blocks=None, **facts):
    """An adapter that finds pixels, and blocks in every call with media."""
    return adapter(pixel_argument=lambda kind, inputs: inputs.get(PIXELS[kind]), blocks=lambda inputs: blocks, **facts)


def incoming(*args, **kwargs) -> Incoming:
    return Incoming.of(stated("blocks"), args, kwargs, Behind())


def test_what_the_model_is_called_with_is_noted():
    pixels, mask, cache = torch.zeros(1), torch.ones(1, 2), DynamicCache()
    noted = incoming(ids_of(["ti"]), pixel_values=pixels, attention_mask=mask, **{CACHE: cache})
    assert noted.ids.tolist() == [[10, 90]] and noted.mask.tolist() == [[True, True]] and noted.cache is cache
    assert noted.pixels == noted.kinds == ("image",) and noted.blocks == "blocks"
    ready = incoming(mm_encoder_outputs={"video": "features", "image": None}, pixel_values=pixels)
    assert ready.encoded == {"video": "features"} and ready.kinds == ("image", "video")
    text = incoming(input_ids=ids_of(["tt"]))
    assert text.kinds == () and text.blocks is None


def test_placeholders_without_their_media_are_refused():
    incoming(input_ids=ids_of(["tt"])).check_text_only(stated())
    incoming(inputs_embeds=torch.zeros(1, 2, 2)).check_text_only(stated())
    with pytest.raises(UnsupportedStageError, match="holds 3 placeholders"):
        incoming(input_ids=ids_of(["tiv", "itt"])).check_text_only(stated())


@pytest.mark.parametrize(
    "packed, arguments",
    [
        (True, {"cu_seq_lens_q": torch.tensor([0, 2])}),
        (False, {"cu_seq_lens_q": None}),
        (True, {"position_ids": torch.tensor([[0, 1, 0, 1]])}),
        (True, {"position_ids": torch.tensor([[0, 1, 5, 6]])}),
        (False, {"position_ids": torch.tensor([[0, 1, 5, 6]]), CACHE: DynamicCache()}),
        (True, {"position_ids": torch.tensor([[0, 1, 1, 2]]), CACHE: DynamicCache()}),
        (False, {"position_ids": torch.tensor([[0, 1, 0, 1]]), "attention_mask": torch.ones(1, 4)}),
        (False, {"position_ids": torch.tensor([[3, 4, 5, 6]])}),
        (False, {"position_ids": torch.tensor([[[0, 1, 0, 1]]]).expand(3, 1, 4)}),
        (True, {"position_ids": torch.tensor([[[0, 1, 0, 1]]]).expand(4, 1, 4)}),
        (False, {"position_ids": torch.stack([torch.arange(4), *[torch.zeros(4).long()] * 3])[:, None]}),
    ],
)
def test_packed_samples_are_told_by_lengths_and_positions(packed, arguments):
    noted = incoming(**arguments)
    assert noted.packed == packed
    if packed:
        with pytest.raises(UnsupportedStageError, match="packed samples"):
            noted.check_packed()
    else:
        noted.check_packed()


def test_a_language_model_that_lacks_the_cache_is_an_error():
    noted = incoming(**{CACHE: DynamicCache()})
    noted.check_cache(DynamicCache())
    incoming().check_cache(None)
    with pytest.raises(VTPruneError, match="called without it"):
        noted.check_cache(None)


# -- columns of a call --------------------------------------------------------------------------------------------

HIDDEN = torch.zeros(2, 3, 8)


def filled(length: int) -> DynamicCache:
    cache = empty_cache()
    fill(cache, torch.zeros(2, length, 8))
    return cache


def test_columns_behind_a_cache():
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    columns = Columns.of(HIDDEN, {CACHE: filled(2)}, mask, has_images=True)
    assert columns.past == 2 and columns.positions.tolist() == [[2, 3, 4]]
    assert columns.real.tolist() == [[True] * 3, [True, True, False]]
    assert columns.past_real.tolist() == [[False, True], [True, True]]


def test_without_padding_nothing_of_it_is_noted():
    columns = Columns.of(HIDDEN, {CACHE: filled(2)}, torch.ones(2, 5), has_images=True)
    assert columns.past_real is None and columns.real.all()
    given = torch.tensor([[7, 8, 9]])
    alone = Columns.of(HIDDEN, {"position_ids": given}, None, has_images=True)
    assert alone.past == 0 and alone.positions is given and alone.real.shape == (2, 3) and alone.real.all()


def test_one_token_without_images_is_not_looked_at():
    mask = torch.zeros(2, 3)
    assert Columns.of(HIDDEN[:, :1], {CACHE: filled(2)}, mask, has_images=False).real.all()
    assert not Columns.of(HIDDEN[:, :1], {CACHE: filled(2)}, mask, has_images=True).real.any()


def test_masks_that_are_not_of_columns_are_refused():
    for mask in (torch.zeros(2, 1, 3, 3), {"full_attention": None}):
        with pytest.raises(UnsupportedStageError, match="4D attention mask"):
            Columns.of(HIDDEN, {}, mask, has_images=True)


# -- the call -----------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """A language model, as far as a call looks at it."""

    config = CONFIG

    def forward(self, inputs_embeds=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        raise AssertionError


def opened(kwargs, prompts=("..tiit", "titiii"), given=None, embeddings=None, **facts):
    """A call on prompts whose images, of 2, 1 and 3 tokens, were encoded in the session (or elsewhere: `given`)."""
    encoded = encoding(row_of(2), row_of(1), row_of(3))
    hidden = torch.zeros(2, 6, 2)
    hidden[columns_of(prompts, "i")] = encoded.features
    recorder = SimpleNamespace(encoding=lambda kind, output, placed: {"image": encoded}[kind])
    names = {"input_ids": ids_of(prompts)} if embeddings is None else {"inputs_embeds": embeddings}
    noted = Incoming.of(stated(), (), names | {"pixel_values": 1}, Behind(prompt_length=4))
    if given is not None:
        noted.encoded["image"] = given
    facts = {"language_model": Decoder(), "decoder_layers": [nn.Linear(1, 1)] * DEPTH} | facts
    mask = (~columns_of(prompts, ".")).long()
    return open_call(adapter(**facts), Owner(), recorder, hidden, kwargs, mask, noted)


def test_a_call_knows_its_prompt_its_media_and_its_cache():
    kwargs = {"use_cache": True}
    call = opened(kwargs)
    assert (call.batch, call.length, call.past) == (2, 6, 0)
    assert call.prompt.sum(1).tolist() == [4, 4] and call.real.sum(1).tolist() == [4, 6]
    assert call.media.images.tolist() == [[-1, -1, -1, 0, 0, -1], [-1, 1, -1, 2, 2, 2]]
    assert isinstance(call.cache, DynamicCache) and cache_of(kwargs) is call.cache


def test_no_cache_is_made_where_none_is_wanted():
    kwargs = {"use_cache": False}
    assert opened(kwargs).cache is None and cache_of(kwargs) is None


def test_placeholders_are_found_by_their_embedding_where_ids_lack():
    table = nn.Embedding.from_pretrained(torch.stack([torch.arange(100.0), torch.ones(100)], 1))
    embeddings = table(ids_of(["..tiit", "titiii"]))
    base = SimpleNamespace(get_input_embeddings=lambda: table)
    call = opened({"use_cache": False}, embeddings=embeddings, base=base)
    assert call.ids is None and call.media.labels.tolist() == [[-1, -1, -1, 0, 0, -1], [-1, 1, -1, 2, 2, 2]]


def test_padding_is_never_visual():
    """Some models are padded with the placeholder's id."""
    ids = ids_of(["..tiit", "titiii"])
    ids[0, :2] = IDS["i"]
    encoded = encoding(row_of(2), row_of(1), row_of(3))
    noted = Incoming.of(stated(), (), {"input_ids": ids, "pixel_values": 1}, Behind())
    recorder = SimpleNamespace(encoding=lambda kind, output, placed: encoded)
    facts = adapter(language_model=Decoder(), decoder_layers=[nn.Linear(1, 1)])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    call = open_call(facts, Owner(), recorder, torch.zeros(2, 6, 2), {"use_cache": False}, mask, noted)
    assert call.media.visual.sum(1).tolist() == [2, 4]


def test_features_from_elsewhere_must_be_those_in_the_prompt():
    assert opened({"use_cache": False}, given="a copy").media.copies == 1
    encoded = encoding(row_of(2), row_of(1), row_of(3), first=100)
    noted = Incoming.of(stated(), (), {"input_ids": ids_of(["..tiit", "titiii"])}, Behind())
    noted.encoded["image"] = "a copy"
    recorder = SimpleNamespace(encoding=lambda kind, output, placed: encoded)
    facts = adapter(language_model=Decoder(), decoder_layers=[nn.Linear(1, 1)])
    with pytest.raises(UnsupportedStageError, match="computed elsewhere"):
        open_call(facts, Owner(), recorder, torch.zeros(2, 6, 2), {"use_cache": False}, None, noted)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_a_trace_is_refused():
    check_traced()
    with pytest.raises(UnsupportedStageError, match="cannot be traced"):
        torch.jit.trace(lambda x: (check_traced(), x)[1], torch.zeros(1))
