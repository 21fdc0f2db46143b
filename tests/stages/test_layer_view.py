# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from vtprune.attention import Places
from vtprune.errors import UnsupportedStageError
from vtprune.signals import EncoderKeys, LayerSignal, SampleKeys
from vtprune.stages.cutting import cut_sequence
from vtprune.stages.layer_view import CutView, Recorded
from vtprune.tokens import Selection

from .hand_made import CONFIG, adapter, call_of, empty_cache, encoding, fill, numbered, row_of

PROMPTS = ("..titt", "tiitti")


def call(*prompts, facts=None, lengths=(1, 2, 1), **fields):
    """Visual columns 3 of the first sample, 1, 2 and 5 of the second, which has no text behind them."""
    encodings = [encoding(*map(row_of, lengths))]
    return call_of(*(prompts or PROMPTS), encodings=encodings, adapter=facts or adapter(), **fields)


def view(prompts, recorded=None, layer=2, hidden=None, recorder=None) -> CutView:
    hidden = numbered(prompts.batch, prompts.sequence.columns.shape[1]) if hidden is None else hidden
    return CutView(prompts.adapter, recorder, prompts, recorded or Recorded(), layer, hidden)


def cut(prompts, *places, **options) -> torch.Tensor:
    """Keep of each sample's visual tokens those at some places."""
    groups = prompts.sample_groups()
    keep = torch.zeros_like(groups.valid)
    for group, kept in enumerate(places):
        keep[group, kept] = True
    return cut_sequence(prompts, prompts.embeddings, groups, Selection(keep), 1, compact=False, **options)[1]


# -- what was recorded --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Marking(LayerSignal):
    """Marks the columns whose state is even."""

    number: int = 0

    def mark(self, view):
        return None if self.number else view.hidden[..., 0] % 2 == 0

    def read_layer(self, view):
        return view.groups.gather(view.marked(self))


def test_what_was_recorded_is_cut_with_the_sequence():
    states, signal = numbered(1, 4), Marking()
    recorded = Recorded(
        projected={(0, "queries"): states, (1, "keys"): -states},
        places={0: Places(torch.tensor([[5, 6, 7, 8]]), states)},
        measured={(signal, 0): torch.tensor([[1.0, 2, 3, 4]])},
        marked={signal: torch.tensor([[True] * 4])},
    )
    recorded.cut(torch.tensor([[1, 3]]))
    assert recorded.projected[0, "queries"].flatten().tolist() == [2, 4]
    assert recorded.projected[1, "keys"].flatten().tolist() == [-2, -4]
    assert recorded.places[0].ids.tolist() == [[6, 8]] and recorded.places[0].rope.flatten().tolist() == [2, 4]
    assert recorded.measured[signal, 0].tolist() == [[2, 4]]
    assert recorded.marked[signal].shape == (1, 4), "marks are by columns of the call"
    recorded.forget(0)
    assert list(recorded.projected) == [(1, "keys")] and not recorded.places and recorded.measured


def test_marks_are_found_again_after_a_cut():
    prompts, recorded, signal = call(), Recorded(), Marking()
    view(prompts, recorded).mark(signal)
    view(prompts, recorded).mark(Marking(1))
    assert list(recorded.marked) == [signal]
    assert view(prompts, recorded).marked(signal).tolist() == [[False, True] * 3] * 2
    cut(prompts, [0], [1, 2])
    assert prompts.sequence.columns.tolist() == [[1, 2, 3, 4, 5], [0, 2, 3, 4, 5]]
    # columns 3, 2 and 5 are left
    assert view(prompts, recorded).read(signal).tolist() == [[True, False], [False, True]]


def test_measured_values_are_summed_over_layers():
    prompts, signal = call(), Marking()
    with pytest.raises(UnsupportedStageError, match="Marking: nothing was measured before layer 2"):
        view(prompts).measured(signal)
    ones = torch.ones(2, 6)
    recorded = Recorded(measured={(signal, 0): ones, (signal, 1): 2 * ones, (Marking(1), 1): 4 * ones})
    assert view(prompts, recorded).measured(signal).unique().tolist() == [3]


def test_encoder_signals_are_of_the_crops_left():
    prompts = call()
    cut(prompts, [0], [1, 2])
    recorder = SimpleNamespace(per_token=lambda encodings, values: torch.arange(1.0, 5)[:, None])
    groups, read = view(prompts, recorder=recorder).encoded(EncoderKeys(0))
    assert groups.rows.tolist() == [0, 1, 1] and read[..., 0].tolist() == [[1], [3], [4]]


# -- columns and rows ---------------------------------------------------------------------------------------------


def test_the_view_is_of_the_layout_now():
    prompts = call()
    cut(prompts, [0], [2], masking=True)
    seen = view(prompts)
    assert seen.visual.nonzero().tolist() == [[0, 3], [1, 5]]
    assert seen.real[1].tolist() == [True, False, False, True, True, True] and seen.present[1].all()
    assert seen.groups.columns.tolist() == [[3], [5]]
    assert seen.read(SampleKeys()) == [prompts.prompt_key(0), prompts.prompt_key(1)]


def test_the_padded_length_is_without_what_stands_behind_the_prompt():
    prompt = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]).bool()
    assert view(call()).padded_length.tolist() == [[6], [6]]
    assert view(call(prompt=prompt)).padded_length.tolist() == [[5], [4]]


def test_text_rows_stand_behind_the_last_visual_token():
    rows, valid = view(call()).text_rows()
    assert rows[0][valid[0]].tolist() == [4, 5]
    assert rows[1][valid[1]].tolist() == [5], "without text, the prompt's last column"
    prompts = call("..titt", "tiittt", lengths=(1, 2))
    cut(prompts, [0], [0])
    rows, valid = view(prompts).text_rows()
    assert prompts.sequence.columns[1].tolist() == [0, 1, 3, 4, 5]
    assert rows.tolist() == [[2, 3, 4], [2, 3, 4]] and valid.tolist() == [[False, True, True], [True] * 3]


def test_the_last_row_is_the_prompts_own():
    rows, valid = view(call()).text_rows(last_only=True)
    assert rows.tolist() == [[5], [5]] and valid.all()
    prompt = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]).bool()
    rows, _ = view(call(prompt=prompt)).text_rows(last_only=True)
    assert rows.tolist() == [[4], [3]]
    rows, valid = view(call(prompt=prompt)).text_rows()
    assert rows[0][valid[0]].tolist() == [4], "an answer is no text of the prompt"


def test_marked_rows_and_the_last_one_where_none_is():
    marked = torch.tensor([[0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    rows, valid = view(call()).rows_of(marked)
    assert rows[0].tolist() == [2, 4] and rows[1, 1] == 5 and valid.tolist() == [[True, True], [False, True]]


def test_weights_are_gathered_by_head():
    weights = torch.arange(24.0).view(2, 2, 6)
    gathered = view(call()).by_head(weights)
    assert gathered.shape == (2, 2, 3)
    assert gathered[0].tolist() == [[3, 0, 0], [9, 0, 0]] and gathered[1].tolist() == [[13, 14, 17], [19, 20, 23]]


# -- attention ----------------------------------------------------------------------------------------------------

EAGER = LlamaConfig(**CONFIG.to_dict() | {"attn_implementation": "eager"})


@pytest.fixture(scope="module")
def decoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaModel(EAGER).eval()


def of_decoder(decoder):
    return adapter(
        decoder_layers=decoder.layers,
        language_model=decoder,
        normed=decoder.norm,
        attention_input=lambda layer, states: layer.input_layernorm(states),
        rope=lambda layer, hidden, positions: decoder.rotary_emb(hidden, positions),
    )


@torch.no_grad()
def weights_of(decoder, layer, hidden, prompts) -> torch.Tensor:
    """What the layer's own eager attention gives: (batch, heads, n, n)."""
    n = hidden.shape[1]
    seen = torch.ones(n, n, dtype=torch.bool).tril() & prompts.sequence.real[:, None]
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    block, rope = decoder.layers[layer], decoder.rotary_emb(hidden, prompts.positions_at(layer))
    return block.self_attn(block.input_layernorm(hidden), position_embeddings=rope, attention_mask=mask)[1]


@torch.no_grad()
def test_attention_of_the_next_layer_is_computed_ahead(decoder):
    prompts = call(facts=of_decoder(decoder))
    cut(prompts, [0], [0, 2])
    hidden = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([[3, 4], [2, 4]])
    found = view(prompts, layer=2, hidden=hidden).attention(2).rows(rows)
    expected = weights_of(decoder, 2, hidden, prompts)
    for sample, columns in enumerate(rows):
        torch.testing.assert_close(found[sample], expected[sample][:, columns], atol=1e-6, rtol=1e-5)
    assert view(prompts, layer=2, hidden=hidden).normed().allclose(decoder.norm(hidden))


@torch.no_grad()
def test_attention_of_an_earlier_layer_is_that_of_what_was_recorded(decoder):
    prompts = call(facts=of_decoder(decoder))
    hidden = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    inner = decoder.layers[1].input_layernorm(hidden)
    attention = decoder.layers[1].self_attn
    recorded = Recorded(
        projected={(1, "queries"): attention.q_proj(inner), (1, "keys"): attention.k_proj(inner)},
        places={1: prompts.places_at(1, hidden)},
    )
    found = view(prompts, recorded, hidden=hidden).attention(1).rows(torch.tensor([[5], [5]]))
    expected = weights_of(decoder, 1, hidden, prompts)[:, :, 5:]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_attention_that_was_not_kept_is_an_error():
    recorded = Recorded(projected={(0, "queries"): torch.zeros(2, 6, 8)})
    for layer in (0, 1):
        with pytest.raises(UnsupportedStageError, match=f"attention of decoder layer {layer} was not kept .* layer 2"):
            view(call(), recorded).attention(layer)


def test_a_second_turn_is_read_with_the_keys_of_the_first(decoder):
    cache = empty_cache()
    fill(cache, torch.arange(32.0).view(2, 2, 8))
    past_real = torch.tensor([[False, True], [True, True]])
    prompts = call(facts=of_decoder(decoder), cache=cache, past=2, past_real=past_real)
    fill(cache, torch.zeros(2, 6, 8))
    context = view(prompts, hidden=torch.zeros(2, 6, 8)).attention(2).context
    assert context.past_keys.shape == (2, 2, 2, 4) and context.past_keys[0, 1, 1].tolist() == [12, 13, 14, 15]
    assert context.past_real is past_real and context.window is None
    assert view(call(facts=of_decoder(decoder)), hidden=torch.zeros(2, 6, 8)).attention(2).context.past_keys is None


def test_rows_count_that_are_of_the_prompt(decoder):
    prompt = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]).bool()
    context = view(call(facts=of_decoder(decoder), prompt=prompt), hidden=torch.zeros(2, 6, 8)).attention(2).context
    assert torch.equal(context.counting, prompt)


def windowed(decoder, window):
    config = LlamaConfig(**CONFIG.to_dict() | {"layer_types": ["sliding_attention"] * 4, "sliding_window": window})
    facts = of_decoder(decoder)
    facts.language_model = SimpleNamespace(config=config)
    return facts


def test_a_window_must_hold_the_whole_conversation(decoder):
    for window, fits in ((8, True), (7, False)):
        cache = empty_cache()
        fill(cache, torch.zeros(2, 2, 8))
        prompts = call(facts=windowed(decoder, window), cache=cache, past=2)
        seen = view(prompts, hidden=torch.zeros(2, 6, 8))
        if fits:
            assert seen.attention(2).context.window == 8
        else:
            with pytest.raises(UnsupportedStageError, match="sliding window of 7 tokens no longer holds all"):
                seen.attention(2)
    alone = view(call(facts=windowed(decoder, 3)), hidden=torch.zeros(2, 6, 8))
    assert alone.attention(2).context.window == 3, "without an earlier turn any window will do"


def test_blocks_are_those_of_the_columns_left(decoder):
    blocks = torch.tensor([[-1, -1, -1, 0, -1, -1], [-1, 0, 0, -1, -1, 1]])
    prompts = call(facts=of_decoder(decoder), blocks=blocks)
    cut(prompts, [0], [1, 2])
    context = view(prompts, hidden=torch.zeros(2, 5, 8)).attention(2).context
    assert context.blocks.tolist() == [[-1, -1, 0, -1, -1], [-1, 0, -1, -1, 1]]
