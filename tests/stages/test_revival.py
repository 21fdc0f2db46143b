# SPDX-License-Identifier: Apache-2.0
"""Tokens that come back to a cache, over steps whose choices are given: in a decoder of four layers, cut before layers
1 and 3."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vtprune.errors import ConfigError, UnsupportedStageError
from vtprune.methods.fastv import FastV
from vtprune.methods.schedules import Reviving
from vtprune.signals import LastQueryAttention
from vtprune.stages.cache import pruned_layers
from vtprune.stages.cutting import cut_sequence
from vtprune.stages.incoming import Columns
from vtprune.stages.revival import RevivalStage
from vtprune.stages.slots import CacheContents, Stored
from vtprune.tokens import Selection
from vtprune.transformers_private import CACHE

from .hand_made import CONFIG, DEPTH, SHAPE, Scripted, adapter, call_of, empty_cache, encoding, fill, row_of

CUTS = (1, 3)


@dataclass(frozen=True, kw_only=True)
class Script(Scripted, Reviving):
    """At both cuts of each step it keeps what it is told."""

    name: ClassVar[str] = "script"

    def cuts(self, shape):
        return CUTS

    def shares(self):
        return (1.0, 1.0)


@pytest.fixture(autouse=True)
def _no_gradients(one_thread):
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def decoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaModel(CONFIG).eval()


class Generation:
    """A prefill, and the steps behind it. passed: for each cut, for each sample, the columns that it lets through."""

    def __init__(self, decoder, method, prompts, images, passed, **fields):
        self.decoder = decoder
        facts = adapter(
            decoder_layers=decoder.layers,
            language_model=decoder,
            rope=lambda layer, hidden, positions: decoder.rotary_emb(hidden, positions),
        )
        self.cache = empty_cache()
        self.call = call_of(
            *prompts, encodings=[encoding(*map(row_of, images))], adapter=facts, cache=self.cache, **fields
        )
        self.stage = RevivalStage(facts, [method], SHAPE, lambda method, tokens: method.choose(tokens))
        self.contents = CacheContents()
        self.stage.after_prefill(self.call, self._prefill(passed), self.contents)
        self.inputs = []

    def _prefill(self, passed) -> dict[int, Stored]:
        """Keys of column c are all c / 10, hidden states c."""
        call, stored = self.call, {}
        hidden = torch.arange(float(call.length))[None, :, None].repeat(call.batch, 1, 8)
        for layer in range(DEPTH):
            if layer in CUTS:
                groups = call.sample_groups()
                columns = groups.gather(call.sequence.columns)
                wanted = [torch.tensor(columns_kept) for columns_kept in passed[CUTS.index(layer)]]
                keep = torch.stack([torch.isin(row, kept) for row, kept in zip(columns, wanted, strict=True)])
                keep &= groups.valid
                gone = groups.valid & ~keep
                stored[layer] = Stored(
                    hidden=groups.gather(hidden), columns=(columns + call.past).masked_fill(~gone, -1)
                )
                found = cut_sequence(call, hidden, groups, Selection(keep), layer, compact=False, keep_separators=True)
                hidden = hidden if found is None else found[0]
            keys = (hidden / 10)[:, None, :, :4].expand(-1, 2, -1, -1)
            self.cache.update(keys, keys, layer)
        return stored

    def step(self, hidden, mask=None):
        """Feed in tokens: what each layer was called with is in `inputs`."""

        def note(module, args, kwargs):
            self.inputs.append((args[0], kwargs))

        self.inputs = []
        hooks = list(self.stage.install())
        hooks += [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in self.decoder.layers]
        arguments = {CACHE: self.cache, "inputs_embeds": hidden}
        count, past = hidden.shape[1], self.cache.get_seq_length()
        arguments["position_ids"] = torch.arange(past, past + count)[None]
        given = Columns.of(hidden, arguments, mask, has_images=False)
        self.stage.begin(self.cache, hidden, given)
        output = self.stage.finish(self.decoder(**arguments))
        for hook in hooks:
            hook.remove()
        return output

    @property
    def slots(self):
        """The columns in each cache layer."""
        return [layer.slots.columns.tolist() for layer in pruned_layers(self.cache)]

    def seen(self, layer, sample=0):
        """For each token that a layer computed: the columns that it sees."""
        columns = pruned_layers(self.cache)[layer].slots.columns[sample]
        return [sorted(columns[row == 0].tolist()) for row in self.inputs[layer][1]["attention_mask"][sample, 0]]


NEW = torch.linspace(-1, 1, 8)[None, None]
"""A generated token."""


def single(decoder, *keeps, **fields):
    """An image in columns 1 to 4, of which 1 to 3 pass the first cut, and 2 the second one."""
    method = Script(keeps=tuple([places] for places in keeps), **fields)
    return Generation(decoder, method, ["tiiiit"], [4], ([[1, 2, 3]], [[2]])), method


def test_a_prefill_tells_every_layer_its_columns(decoder):
    generation, _ = single(decoder)
    table = pruned_layers(generation.cache)[0].slots.table
    assert table.first == 0 and table.prunable.tolist() == [[False, True, True, True, True, False]]
    assert table.counts.tolist() == [[3, 1]] and table.positions.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert generation.slots == [[[0, 1, 2, 3, 4, 5]], [[0, 1, 2, 3, 5]], [[0, 1, 2, 3, 5]], [[0, 2, 5]]]
    assert [layer.stored is not None for layer in generation.cache.layers] == [False, True, False, True]
    in_cache, stored = generation.contents.of([torch.tensor([1, 2, 3, 4])])
    assert [layer[0].tolist() for layer in in_cache] == [[1, 2, 3, 4], [1, 2, 3], [1, 2, 3], [2]]
    assert stored == (1 + 2) * 8 * 4


def test_a_chosen_token_is_computed_where_its_key_is_missing(decoder):
    """Column 4 passes both cuts now; it is stored nowhere any more."""
    generation, _ = single(decoder, [1, 2, 3], [2])
    generation.step(NEW)
    assert generation.slots == [
        [[0, 1, 2, 3, 4, 5, 6]],
        [[0, 1, 2, 3, 5, 4, 6]],
        [[0, 1, 2, 3, 5, 4, 6]],
        [[0, 2, 5, 4, 6]],
    ]
    assert [hidden.shape[1] for hidden, _ in generation.inputs] == [1, 2, 2, 2]
    assert generation.inputs[1][0][0, 0].tolist() == [4] * 8, "what was stored of column 4"
    assert generation.cache.layers[1].stored is None
    assert sorted(generation.cache.layers[3].stored.columns[0].tolist()) == [1, 3]
    assert [layer.physical for layer in generation.cache.layers] == [7, 7, 7, 5]
    assert [layer.get_seq_length() for layer in generation.cache.layers] == [7] * 4


def test_a_token_that_comes_back_only_so_far_is_stored_there(decoder):
    generation, _ = single(decoder, [1, 2, 3], [0], [1, 2, 3], [0])
    generation.step(NEW)
    assert generation.slots[2] == [[0, 1, 2, 3, 5, 4, 6]] and generation.slots[3] == [[0, 2, 5, 6]]
    stored = generation.cache.layers[3].stored
    assert sorted(stored.columns[0].tolist()) == [1, 3, 4]
    place = stored.columns[0].tolist().index(4)
    # What entered layer 2 beside the new token, put through that layer
    hidden, kwargs = generation.inputs[2]
    assert not torch.equal(stored.hidden[0, place], hidden[0, 0]) and stored.hidden.shape == (1, 3, 8)
    generation.step(NEW)
    assert generation.slots[3] == [[0, 2, 5, 6, 7]]


def test_a_token_may_come_back_at_the_second_cut_alone(decoder):
    generation, _ = single(decoder, [0, 1], [0], [0, 1], [1], [0, 2], [1])
    generation.step(NEW)  # column 1
    assert generation.slots[1] == [[0, 1, 2, 3, 5, 6]] and generation.slots[3] == [[0, 2, 5, 1, 6]]
    generation.step(NEW)  # column 2, which is there
    assert generation.slots[3] == [[0, 2, 5, 1, 6, 7]]
    assert [hidden.shape[1] for hidden, _ in generation.inputs] == [1, 1, 1, 1]
    generation.step(NEW)  # columns 1 and 3
    assert generation.slots[3] == [[0, 2, 5, 1, 6, 7, 3, 8]]
    assert generation.cache.layers[3].stored is None
    assert generation.cache.layers[1].stored.columns.tolist() == [[4]]


def test_every_token_sees_what_stands_before_it_and_is_chosen(decoder):
    generation, _ = single(decoder, [1, 2, 3], [2])
    generation.step(NEW)
    assert generation.seen(0) == [[0, 1, 2, 3, 4, 5, 6]]
    assert generation.seen(1) == generation.seen(2) == [[0, 2, 3, 4], [0, 2, 3, 4, 5, 6]]
    assert generation.seen(3) == [[0, 4], [0, 4, 5, 6]]


def test_tokens_have_their_own_positions(decoder):
    generation, _ = single(decoder, [1, 2, 3], [2])
    generation.step(NEW)
    for layer, positions in ((0, [6]), (1, [4, 6]), (3, [4, 6])):
        cos, _ = generation.inputs[layer][1]["position_embeddings"]
        expected, _ = decoder.rotary_emb(NEW, torch.tensor([positions]))
        assert torch.equal(cos, expected), layer


def test_only_the_new_tokens_are_returned(decoder):
    generation, _ = single(decoder, [1, 2, 3], [2])
    assert generation.step(NEW).last_hidden_state.shape == (1, 1, 8)
    assert generation.stage.now.step is None
    given = SimpleNamespace(new=torch.tensor([[6]]), layers=pruned_layers(generation.cache))
    for output, states in (
        ((torch.arange(3)[None, :, None], "cache"), lambda output: output[0]),
        (
            type("Output", (SimpleNamespace,), {"get": lambda self, name: getattr(self, name)})(
                last_hidden_state=torch.arange(3)[None, :, None], hidden_states=(torch.arange(3)[None, :, None], None)
            ),
            lambda output: output.hidden_states[0],
        ),
    ):
        generation.stage.now.step = given
        assert states(generation.stage.finish(output)).tolist() == [[[2]]]


def test_the_method_is_shown_all_tokens_that_the_layer_before_could_see(decoder):
    """By the keys of that layer, in the order of the prompt; the budgets are those of the prefill."""
    generation, method = single(decoder, [1, 2, 3], [2])
    generation.step(NEW)
    first, second = method.seen
    assert first.layer == 1 and first.features.shape == (1, 4, 8)
    torch.testing.assert_close(first.features[0, :, 0], torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert second.layer == 3 and second.budget.tolist() == [1] and first.budget.tolist() == [3]
    torch.testing.assert_close(second.features[0, :2, 0], torch.tensor([0.2, 0.3]))
    torch.testing.assert_close(second.features[0, 2], generation.cache.layers[2].inner.keys[0, :, 5].flatten())


@dataclass(frozen=True, kw_only=True)
class Reading(Script):
    """It keeps the last tokens."""

    def select(self, tokens):
        self.read.append(tokens[LastQueryAttention(tokens.layer - 1)])
        places = torch.arange(tokens.valid.shape[1])
        return Selection(tokens.valid & (places >= (tokens.lengths - tokens.budget)[:, None]))


def test_attention_is_that_of_the_last_new_token(decoder):
    """Of two; before the second cut column 4 stands in front of them, and column 1 is hidden."""
    method = Reading(requests=(LastQueryAttention(0), LastQueryAttention(2)))
    generation = Generation(decoder, method, ["tiiiit"], [4], ([[1, 2, 3]], [[2]]))
    generation.step(torch.cat([-NEW, NEW], 1))
    assert generation.slots[2] == [[0, 1, 2, 3, 5, 4, 6, 7]]
    for (index, hidden_slots, visual_slots), read in zip(
        ((0, [], [1, 2, 3, 4]), (2, [1], [2, 3, 5])), method.read, strict=True
    ):
        layer, keys = decoder.layers[index], generation.cache.layers[index].inner.keys
        states = layer.input_layernorm(generation.inputs[index][0][:, -1:])
        query = layer.self_attn.q_proj(states).view(1, 1, 2, 4).transpose(1, 2)
        query, _ = apply_rotary_pos_emb(query, query, *decoder.rotary_emb(NEW, torch.tensor([[7]])))
        scores = query @ keys.mT * 4**-0.5
        scores[..., hidden_slots] = -torch.inf
        torch.testing.assert_close(read, scores.softmax(-1)[:, :, 0, visual_slots], atol=1e-6, rtol=1e-5)


def two_samples(decoder, *keeps, **fields):
    """Images in the columns 1 to 3 and 2 to 3. Columns 1 and 2 pass in the first sample, 3 in the second one."""
    method = Script(keeps=keeps)
    passed = ([[1, 2], [3]], [[1, 2], [3]])
    return Generation(decoder, method, ["tiiitt", ".tiitt"], [3, 2], passed, **fields)


def test_samples_choose_by_themselves(decoder):
    generation = two_samples(decoder, ([1, 2], [1]), ([0, 1], [0]), ([0, 1], [1]), ([0], [0]))
    assert generation.slots[1] == [[0, 1, 2, 4, 5], [-1, 1, 3, 4, 5]]
    generation.step(NEW.expand(2, -1, -1), torch.tensor([[1] * 7, [0] + [1] * 6]))
    assert generation.slots[1] == [[0, 1, 2, 4, 5, 3, 6], [-1, 1, 3, 4, 5, -1, 6]]
    assert generation.seen(1, 0) == [[0, 2, 3], [0, 2, 3, 4, 5, 6]]
    assert generation.seen(1, 1)[1] == [1, 3, 4, 5, 6]
    generation.step(NEW.expand(2, -1, -1), torch.tensor([[1] * 8, [0] + [1] * 7]))
    assert generation.slots[1][1] == [-1, 1, 3, 4, 5, -1, 6, 7]


def test_what_one_sample_gets_back_another_does_not(decoder):
    method = Script(keeps=(([1, 2], [0, 1]), ([0], [0])))
    passed = ([[1, 2], [1, 2]], [[1], [1]])
    generation = Generation(decoder, method, ["tiiitt", "tiiitt"], [3, 3], passed)
    generation.step(NEW.expand(2, -1, -1))
    assert generation.slots[1] == [[0, 1, 2, 4, 5, 3, 6], [0, 1, 2, 4, 5, -1, 6]]
    assert generation.cache.layers[1].stored.columns.tolist() == [[-1], [3]]


def test_padding_among_new_tokens_is_seen_by_none(decoder):
    generation = two_samples(decoder, ([0, 1], [1]), ([0, 1], [0]))
    mask = torch.tensor([[1] * 8, [0] + [1] * 6 + [0]])
    generation.step(NEW.expand(2, 2, -1), mask)
    assert generation.slots[0][1] == [-1, 1, 2, 3, 4, 5, 6, -1]
    assert generation.seen(0, 1)[0] == [1, 2, 3, 4, 5, 6]


def test_blocks_see_one_another_both_ways(decoder):
    blocks = torch.tensor([[-1, 0, 0, 0, 0, -1]])
    method = Script(keeps=([[1, 2, 3]], [[2]]))
    generation = Generation(decoder, method, ["tiiiit"], [4], ([[1, 2, 4]], [[2]]), blocks=blocks)
    generation.step(NEW)
    assert generation.seen(1) == [[0, 2, 3, 4], [0, 2, 3, 4, 5, 6]], "column 3 came back, and sees column 4"


def test_deepstack_features_are_added_to_tokens_that_came_back(decoder):
    features = {layer: torch.full((4, 8), 10.0 * layer) + torch.arange(4)[:, None] for layer in (1, 2, 3)}
    method = Script(keeps=([[1, 2, 3]], [[2]]))
    generation = Generation(decoder, method, ["tiiiit"], [4], ([[1, 2, 3]], [[2]]), deepstack=features)
    table = pruned_layers(generation.cache)[0].slots.table
    assert set(table.deepstack) == {2, 3} and table.deepstack[3][0, :, 0].tolist() == [0, 30, 31, 32, 33, 0]
    given = []
    watch = decoder.layers[1].register_forward_hook(lambda module, args, output: given.append(output))
    generation.step(NEW)
    watch.remove()
    output = given[0][0] if isinstance(given[0], tuple) else given[0]
    entering = generation.inputs[2][0]
    torch.testing.assert_close(entering[:, :1], output[:, :1] + 23)
    assert torch.equal(entering[:, 1:], output[:, 1:])


def test_a_later_turn_counts_from_its_first_column(decoder):
    """The cache held two columns before, one of them padding."""
    past = torch.tensor([[False, True]])
    cache = empty_cache()
    fill(cache, torch.zeros(1, 2, 8))
    facts = adapter(decoder_layers=decoder.layers, language_model=decoder)
    call = call_of("tiiit", encodings=[encoding(row_of(3))], adapter=facts, cache=cache, past=2, past_real=past)
    stage = RevivalStage(facts, [Script()], SHAPE, None)
    groups = call.sample_groups()
    cut_sequence(call, torch.zeros(1, 5, 8), groups, Selection(torch.tensor([[True, False, True]])), 1, compact=False)
    contents = CacheContents()
    stage.after_prefill(call, {}, contents)
    layers = pruned_layers(cache)
    assert layers[0].slots.table.first == 2
    assert layers[0].slots.columns.tolist() == [[-1, 1, 2, 3, 4, 5, 6]]
    assert layers[1].slots.columns.tolist() == [[-1, 1, 2, 3, 5, 6]]


@pytest.mark.parametrize(
    "axes, rows, expected",
    [
        (3, [7], [7, 7, 7]),
        (4, [7], [7, 7, 7, 7]),
        (3, [10, 20, 30], [10, 20, 30]),
        (3, [0, 10, 20, 30], [10, 20, 30]),
        (4, [10, 20, 30], [10, 10, 20, 30]),
        (4, [0, 10, 20, 30], [0, 10, 20, 30]),
    ],
)
def test_new_tokens_may_come_with_any_row_of_positions(decoder, axes, rows, expected):
    """The prompt has the axes of M-RoPE, with or without a row for text in front of them."""
    method = Script()
    positions = torch.zeros(axes, 1, 6, dtype=torch.long)
    generation = Generation(decoder, method, ["tiiiit"], [4], ([[1, 2, 3]], [[2]]), positions=positions)
    given = torch.tensor(rows)[:, None, None] if len(rows) > 1 else torch.tensor([rows])
    generation.stage.begin(generation.cache, NEW, Columns(6, torch.tensor([[True]]), given, None))
    step = generation.stage.now.step
    assert step.new_positions.shape == (axes, 1, 1) and step.new_positions.flatten().tolist() == expected
    assert step.new.tolist() == [[6]]


# -- what is refused ----------------------------------------------------------------------------------------------


def test_without_such_a_method_nothing_is_done(decoder):
    stage = RevivalStage(adapter(), [FastV(keep_ratio=0.5)], SHAPE, None)
    assert list(stage.install()) == [] and stage.cuts == ()
    stage.check(None, True)
    stage.after_prefill(None, {}, None)


def test_methods_that_drop_for_good_are_not_combined_with_it():
    with pytest.raises(ConfigError, match="script cannot be combined with fastv"):
        RevivalStage(adapter(), [FastV(keep_ratio=0.5), Script()], SHAPE, None)


def test_layers_that_forget_by_themselves_are_refused():
    kinds = ["full_attention"] * 3 + ["sliding_attention"]
    config = LlamaConfig(**CONFIG.to_dict() | {"layer_types": kinds, "sliding_window": 8})
    with pytest.raises(UnsupportedStageError, match="have a sliding window"):
        RevivalStage(adapter(text_config=config), [Script()], SHAPE, None)


def test_prompts_that_are_sent_again_second_turns_and_other_back_ends_are_refused():
    stage = RevivalStage(adapter(), [Script()], SHAPE, None)
    call = SimpleNamespace(cache="a cache", wrapped=False)
    stage.check(SimpleNamespace(cache=None), False)
    stage.check(call, False)
    with pytest.raises(UnsupportedStageError, match="use_cache=True"):
        stage.check(call, True)
    with pytest.raises(UnsupportedStageError, match="images in one turn of a conversation only"):
        stage.check(SimpleNamespace(cache="a cache", wrapped=True), False)
    config = LlamaConfig(**CONFIG.to_dict())
    config._attn_implementation = "flash_attention_2"
    stage = RevivalStage(adapter(text_config=config), [Script()], SHAPE, None)
    with pytest.raises(UnsupportedStageError, match="which flash_attention_2 cannot mask"):
        stage.check(call, False)
