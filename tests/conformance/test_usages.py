# SPDX-License-Identifier: Apache-2.0
"""What people wrap around `generate()` and `forward()`: right, or refused by name. `docs/usages.md` lists it all."""

from __future__ import annotations

import ast
import copy
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, disk_offload
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import (
    DynamicCache,
    Gemma3ForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    Trainer,
    TrainingArguments,
    WatermarkingConfig,
)
from transformers.generation import BaseStreamer
from transformers.modeling_layers import GradientCheckpointingLayer

import vtprune
from vtprune.errors import UnsupportedStageError, VTPruneError
from vtprune.testing import families, media
from vtprune.testing.around_layers import to_logits
from vtprune.testing.recompute import recompute, visual_columns
from vtprune.transformers_private import CACHE

from .matrix import refusal
from .methods import spec

ATOL = 1e-4
NEW = 5
NAMES = ("llava", "qwen2_5_vl", "gemma3")
# Before the LLM; inside it; inside it, and by what layers change.
METHODS = ("mmtok", "fastv", "transprune")
EVERY = [(name, method) for name in NAMES for method in METHODS]
# Each method once, each family once.
DIAGONAL = list(zip(NAMES, ("transprune", "fastv", "mmtok"), strict=True))

every = pytest.mark.parametrize(("name", "method"), EVERY)
diagonal = pytest.mark.parametrize(("name", "method"), DIAGONAL)


def generate(model, inputs: dict[str, Tensor], **options):
    options = {"max_new_tokens": NEW, "suppress_tokens": [families.IMAGE, families.VIDEO]} | options
    return model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)


def steps(output) -> Tensor:
    """(batch, new tokens, vocabulary)"""
    return torch.stack(output.logits, 1)


def kept(session) -> list[list[int]]:
    report = session.report
    return [
        report.kept(sample, layer).tolist() for sample in range(len(report.visual)) for layer in range(report.depth)
    ]


def answers(inputs: dict[str, Tensor], tokens: int = 3) -> Tensor:
    """Labels of the last tokens of each prompt."""
    labels = inputs["input_ids"].clone()
    labels[:, :-tokens] = -100
    return labels


def assert_same(first, second) -> None:
    assert torch.equal(first.sequences, second.sequences)
    torch.testing.assert_close(steps(first), steps(second), atol=ATOL, rtol=0)


# -- what generate() is told -------------------------------------------------------------------------------------------

DECODING: dict[str, dict[str, Any]] = {
    "beams, several returned": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 2, "top_k": 20, "min_p": 0.01},
    "typical sampling": {"do_sample": True, "typical_p": 0.9, "top_p": 0.9, "temperature": 0.7},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "penalty on the prompt": {"encoder_repetition_penalty": 1.2},
    "bad words": {"bad_words_ids": [[3], [4, 5]], "min_new_tokens": 4},
    "bias": {"sequence_bias": [[[7], 3.0]]},
    "constraint by prefix": {"prefix_allowed_tokens_fn": lambda row, ids: [5, 6, 7, 8, 9 + int(ids[-1]) % 10]},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=2.5)},
    "guidance": {"guidance_scale": 1.5},
    "time limit": {"max_time": 100.0, "renormalize_logits": True},
    "stopping criterion": {"stopping_criteria": StoppingCriteriaList([lambda ids, scores: ids[:, -1] % 2 == 0])},
}


@pytest.mark.parametrize("usage", DECODING)
@diagonal
def test_decoding(name, method, usage):
    """With the pruned KV cache as without one, where every step sends the whole prompt again."""
    if (name, usage) == ("qwen2_5_vl", "guidance"):
        pytest.skip("fails without vtprune, too")
    model = families.shared(name)
    inputs = families.batch(name, model, samples=2).inputs
    outputs = []
    with vtprune.prune(model, method, keep_ratio=0.5) as session:
        for use_cache in (True, False):
            torch.manual_seed(0)
            outputs.append(generate(model, inputs, use_cache=use_cache, **DECODING[usage]))
            outputs[-1].kept = kept(session)
    assert_same(*outputs)
    if usage != "guidance":  # the report is then that of the prompt without the image
        assert outputs[0].kept == outputs[1].kept


def diverse_beams(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """Two groups of two beams; the second is penalised for what the first has just chosen."""
    kwargs.pop("output_logits", None)
    length, scores = input_ids.shape[1], torch.tensor([[0.0, -1e9, 0.0, -1e9]])
    ids = input_ids
    for _ in range(generation_config.max_new_tokens):
        logits = forward(model, ids, ids.shape[1] - length, kwargs)
        total = scores[..., None] + logits.log_softmax(-1)[None]
        total[..., [families.IMAGE, families.VIDEO]] = -torch.inf
        first, from_first = total[0, :2].flatten().topk(2)
        penalty = torch.zeros(total.shape[-1]).index_fill(0, from_first % total.shape[-1], 0.7)
        second, from_second = (total[0, 2:] - penalty).flatten().topk(2)
        beams = torch.cat([from_first // total.shape[-1], from_second // total.shape[-1] + 2])
        tokens = torch.cat([from_first, from_second]) % total.shape[-1]
        scores = torch.cat([first, second])[None]
        ids = torch.cat([ids[beams], tokens[:, None]], 1)
        if kwargs["use_cache"]:
            kwargs[CACHE].reorder_cache(beams)
    return ids, scores


def forward(model, ids: Tensor, done: int, kwargs: dict[str, Any], **options) -> Any:
    """Logits of the last column, after `done` generated tokens."""
    cached = kwargs["use_cache"] and done
    if done:
        kwargs.pop("position_ids", None)  # of the prompt
    inputs = model.prepare_inputs_for_generation(
        ids, next_sequence_length=1 if cached else None, is_first_iteration=not cached, **kwargs
    )
    output = model(**inputs, **options)
    if kwargs["use_cache"]:
        kwargs[CACHE] = output[CACHE]
    return output if options else output.logits[:, -1]


def early_layers(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """DoLa: what the last layer says more than an early one."""
    length, ids, logits = input_ids.shape[1], input_ids, []
    for _ in range(generation_config.max_new_tokens):
        output = forward(model, ids, ids.shape[1] - length, kwargs, output_hidden_states=True)
        early = model.get_output_embeddings()(output.hidden_states[2][:, -1])
        logits.append(output.logits[:, -1].log_softmax(-1) - early.log_softmax(-1))
        ids = torch.cat([ids, logits[-1].argmax(-1)[:, None]], 1)
    return ids, torch.stack(logits)


def contrastive(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """Of the three likeliest tokens the one whose state is least like the states before it, on copies of the cache."""
    cache = kwargs[CACHE]
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
    output = model(**inputs, output_hidden_states=True)
    states, logits, ids, chosen = output.hidden_states[-1], output.logits[:, -1], input_ids, []
    assert states.shape[1] == input_ids.shape[1]
    for _ in range(generation_config.max_new_tokens):
        likely, candidates = logits.softmax(-1).topk(3)
        repeated = copy.deepcopy(cache)
        repeated.batch_repeat_interleave(3)
        output = model(candidates.T, output_hidden_states=True, **{CACHE: repeated})
        new = output.hidden_states[-1]
        alike = nn.functional.cosine_similarity(new, states, dim=-1).amax(1)
        best = int((0.4 * likely[0] - 0.6 * alike).argmax())
        repeated.batch_select_indices(torch.tensor([best]))
        cache, logits, states = (
            repeated,
            output.logits[best : best + 1, -1],
            torch.cat([states, new[best : best + 1]], 1),
        )
        ids = torch.cat([ids, candidates[:, best : best + 1]], 1)
        chosen.append(alike)
    return ids, torch.stack(chosen)


@pytest.mark.parametrize("method", METHODS)
def test_custom_generate(method):
    """Diverse beams and DoLa, which moved out of transformers, as functions for `custom_generate`."""
    model = families.shared("llava")
    inputs = families.batch("llava", model).singles[0]
    for strategy, options in ((diverse_beams, {"num_beams": 4}), (early_layers, {})):
        results = []
        with vtprune.prune(model, method, keep_ratio=0.5):
            for use_cache in (True, False):
                arguments = {"max_new_tokens": NEW, "use_cache": use_cache, "custom_generate": strategy} | options
                results.append(model.generate(**inputs, **arguments))
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1], results[1][1], atol=ATOL, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_contrastive_search(method):
    """The states that candidates are compared with are those of the tokens left; a dropped one adds none."""
    model = families.shared("llava")
    inputs = families.batch("llava", model).singles[0]
    length = inputs["input_ids"].shape[1]
    with vtprune.prune(model, method, keep_ratio=0.5, prompt_length=length) as session:
        ids, alike = model.generate(**inputs, max_new_tokens=NEW, custom_generate=contrastive)
        text = [c for c in range(length) if c not in visual_columns(model, inputs).tolist()]
        alive = sorted([*text, *session.report.kept(0).tolist()])
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"]}
        states = model.model(**whole).last_hidden_state[0]
    before = states[[*alive, *range(length, ids.shape[1])]]
    for step in range(NEW):
        column = length + step
        expected = nn.functional.cosine_similarity(states[column], before[: len(alive) + step], dim=-1).max()
        assert (alike[step] - expected).abs().min() < ATOL


@pytest.mark.parametrize("name", NAMES)
def test_early_exit_drafts_fail_by_themselves(name):
    """transformers looks for the number of layers where no such model has it, with a session or without."""
    model = families.build(name)
    inputs = families.batch(name, model).singles[0]
    for around in (nullcontext(), vtprune.prune(model, "fastv", keep_ratio=0.5, strict=False)):
        with around, pytest.raises(AttributeError, match="num_hidden_layers"):
            generate(model, inputs, assistant_early_exit=3)


class Collected(BaseStreamer):
    def __init__(self):
        self.tokens: list[int] = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        pass


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{token}": token for token in range(families.IMAGE)} | {"abcdef": families.IMAGE}  # a probe
    inner = Tokenizer(WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", bos_token="w1", unk_token="w0")


@diagonal
def test_stop_strings_and_streamers(name, method, tokenizer):
    model = families.shared(name)
    inputs = families.batch(name, model).singles[0]
    length = inputs["input_ids"].shape[1]
    with vtprune.prune(model, method, keep_ratio=0.5):
        plain = generate(model, inputs, suppress_tokens=list(range(families.IMAGE, media.VOCABULARY)))
        words = plain.sequences[0, length:].tolist()
        streamer = Collected()
        stopped = generate(
            model,
            inputs,
            suppress_tokens=list(range(families.IMAGE, media.VOCABULARY)),
            stop_strings=[f"w{words[2]}"],
            tokenizer=tokenizer,
            streamer=streamer,
        )
    first = words.index(words[2])
    assert stopped.sequences[0, length:].tolist() == words[: first + 1]
    assert streamer.tokens == stopped.sequences[0].tolist()


@diagonal
def test_token_healing(name, method, tokenizer):
    """transformers rewrites the end of the prompt before anything is computed."""
    model = families.shared(name)
    inputs = families.batch(name, model).singles[0]
    with vtprune.prune(model, method, keep_ratio=0.5):
        healed = [
            generate(model, inputs, token_healing=True, tokenizer=tokenizer, use_cache=use_cache)
            for use_cache in (True, False)
        ]
    assert_same(*healed)


# -- what comes back besides logits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", families.PRUNED_INSIDE)
def test_hidden_states_stand_at_the_columns_of_the_prompt(name, method):
    """As long as the prompt in every layer; a dropped token has the state of the one left before it."""
    model = families.shared(name)
    if method == "mmtok" and vtprune.adapter_for(model).features_unread:
        method = "divprune"  # before the LLM, too
    if refusal(model, spec(method)) is not None:
        pytest.skip("refused on this family")
    inputs = families.batch(name, model).singles[0]
    length = inputs["input_ids"].shape[1]
    seen: list[Tensor] = []
    adapter = vtprune.adapter_for(model)
    layers = adapter.decoder_layers
    hooks = [layer.register_forward_hook(lambda module, args, output: seen.append(output)) for layer in layers]
    with vtprune.prune(model, method, keep_ratio=0.5) as session:
        output = model(**inputs, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    visual = set(visual_columns(model, inputs).tolist())
    text = [column for column in range(length) if column not in visual]
    for number, state in enumerate(output.hidden_states):
        alive = sorted([*text, *session.report.kept(0, max(number - 1, 0)).tolist()])
        state = adapter.token_states(state)
        assert state.shape[1] == length
        before = torch.searchsorted(torch.tensor(alive), torch.arange(length), right=True) - 1
        if 0 < number < len(layers):
            own = adapter.token_states(seen[number - 1][0] if isinstance(seen[number - 1], tuple) else seen[number - 1])
            assert own.shape[1] == len(alive)
            reached = before >= 0
            assert torch.equal(state[0, reached], own[0, before[reached]])
    assert len(output.hidden_states) == len(layers) + 1
    if getattr(vtprune.adapter_for(model).language_model.config, "final_logit_softcapping", None) is None:
        assert torch.equal(to_logits(model, output.hidden_states[-1]), output.logits)


@pytest.mark.release
@pytest.mark.parametrize("side", ["left", "right"])
@every
def test_hidden_states_of_a_batch(name, method, side):
    """The state of each sample's last token, as value heads and reward models pick it."""
    model = families.shared(name)
    batch = families.batch(name, model, padding_side=side)
    with vtprune.prune(model, method, keep_ratio=0.5):
        states = model(**batch.inputs, output_hidden_states=True).hidden_states
        for row, single in enumerate(batch.singles):
            last = batch.first_column(row) + single["input_ids"].shape[1] - 1
            alone = model(**single, output_hidden_states=True).hidden_states
            for together, own in zip(states, alone, strict=True):
                torch.testing.assert_close(together[row, last], own[0, -1], atol=ATOL, rtol=0)


@pytest.mark.parametrize("method", [*METHODS, "lazyllm", "mustdrop"])
def test_hidden_states_of_generated_tokens(method):
    model = families.shared("llava")
    inputs = families.batch("llava", model, samples=2).inputs
    with vtprune.prune(model, method, keep_ratio=0.5):
        output = generate(model, inputs, output_hidden_states=True)
        some = model(**inputs, output_hidden_states=[3]).hidden_states
    assert [number for number, state in enumerate(some) if state is not None] == [3]
    assert some[3].shape[1] == inputs["input_ids"].shape[1]
    lengths = [[state.shape[1] for state in step] for step in output.hidden_states]
    assert lengths[0] == [inputs["input_ids"].shape[1]] * 9 and lengths[1:] == [[1] * 9] * (NEW - 1)
    for step, logits in zip(output.hidden_states, output.logits, strict=True):
        torch.testing.assert_close(model.lm_head(step[-1][:, -1]), logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "mistral3"])
def test_attentions_are_over_the_columns_left(name):
    """In the order of the prompt: they are those of the full model under a mask that hides what is gone."""
    model = families.shared(name, "eager")
    inputs = families.batch(name, model).singles[0]
    length = inputs["input_ids"].shape[1]
    with vtprune.prune(model, "uniform", keep_ratio=0.5, positions="original") as session:
        attentions = model(**inputs, output_attentions=True).attentions
    hidden = torch.tensor(sorted(set(visual_columns(model, inputs).tolist()) - set(session.report.kept(0).tolist())))
    alive = torch.tensor([column for column in range(length) if column not in hidden.tolist()])
    mask = inputs["attention_mask"].index_fill(1, hidden, 0)
    if hasattr(model.model, "get_rope_index"):  # of the whole prompt
        given = {key: inputs[key] for key in ("input_ids", "image_grid_thw", "mm_token_type_ids", "attention_mask")}
        places = model.model.get_rope_index(**given)[0]
    else:
        places = torch.arange(length)[None]
    full = model(**(inputs | {"attention_mask": mask}), position_ids=places, output_attentions=True).attentions
    for ours, theirs in zip(attentions, full, strict=True):
        torch.testing.assert_close(ours, theirs[:, :, alive][..., alive], atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_a_classifier_on_top(method, side):
    config = copy.deepcopy(families.shared("gemma3").config)
    config.num_labels = 3
    torch.manual_seed(0)
    model = Gemma3ForSequenceClassification(config).eval()
    model.load_state_dict(families.shared("gemma3").state_dict(), strict=False)
    batch = families.batch("gemma3", model, padding_side=side)
    with vtprune.prune(model, method, keep_ratio=0.5) as session:
        together = model(**batch.inputs).logits
        assert session.report.keep_ratio < 1
        alone = torch.cat([model(**single).logits for single in batch.singles])
    torch.testing.assert_close(together, alone, atol=ATOL, rtol=0)


# -- caches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, "mustdrop", "lazyllm"])
def test_names_and_objects_of_growing_caches(method):
    """A name, an object with a config or without one: all are the default cache."""
    model = families.shared("llava")
    inputs = families.batch("llava", model).singles[0]
    caches = [
        {"cache_implementation": "dynamic"},
        {CACHE: DynamicCache()},
        {CACHE: DynamicCache(config=model.config.get_text_config())},
    ]
    with vtprune.prune(model, method, keep_ratio=0.5) as session:
        default, chosen = generate(model, inputs), kept(session)
        for cache in caches:
            assert_same(generate(model, inputs, **cache), default)
            assert kept(session) == chosen


@pytest.mark.parametrize("method", ["mustdrop", "lazyllm"])
def test_methods_that_need_a_cache_say_so(method):
    model = families.shared("llava")
    inputs = families.batch("llava", model).singles[0]
    with (
        vtprune.prune(model, method, keep_ratio=0.5),
        pytest.raises(UnsupportedStageError, match="while decoding needs one: use_cache=True"),
    ):
        generate(model, inputs, use_cache=False)


@pytest.mark.parametrize("backend", ["hqq", "optimum.quanto"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_quantised_caches(name, backend):
    """As near to the plain cache as without pruning. Methods that reach into a cache are refused."""
    pytest.importorskip(backend)
    model = families.shared(name)
    inputs = families.batch(name, model).singles[0]
    config = {"backend": backend.rpartition(".")[2], "nbits": 8 if backend == "hqq" else 4, "q_group_size": 8}
    quantised = {"cache_implementation": "quantized", "cache_config": config}

    def distance() -> float:
        # As long as answers may have come apart, only the first two steps can be compared.
        pair = [steps(generate(model, inputs, max_new_tokens=2, **options)) for options in ({}, quantised)]
        return float((pair[0] - pair[1]).abs().mean())

    unpruned = distance()
    for method in METHODS:
        with vtprune.prune(model, method, keep_ratio=0.5) as session:
            assert distance() < 10 * unpruned
            assert session.report.keep_ratio < 1
    with (
        vtprune.prune(model, "lazyllm", keep_ratio=0.5),
        pytest.raises(UnsupportedStageError, match="QuantizedLayer cache layer; use the default dynamic cache"),
    ):
        generate(model, inputs, **quantised)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads a KV cache from an accelerator only")
@pytest.mark.parametrize("method", [*METHODS, "mustdrop", "lazyllm"])
def test_offloaded_cache(method):
    model = families.build("llava").cuda()
    inputs = families.batch("llava", model).to("cuda", torch.float32).singles[0]
    with vtprune.prune(model, method, keep_ratio=0.5):
        assert_same(generate(model, inputs, cache_implementation="offloaded"), generate(model, inputs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads a KV cache from an accelerator only")
def test_a_static_cache_that_is_offloaded_is_refused():
    model = families.build("llava").cuda()
    inputs = families.batch("llava", model).to("cuda", torch.float32).singles[0]
    with (
        vtprune.prune(model, "divprune", keep_ratio=0.5),
        pytest.raises(UnsupportedStageError, match="static cache that is offloaded"),
    ):
        generate(model, inputs, cache_implementation="offloaded_static")


def test_continuous_batching():
    """Prompts of text come out as without a session; placeholders of images, which come without pixels, are refused."""
    from transformers import ContinuousBatchingConfig  # younger than the oldest release

    model = families.build("llava")
    texts = [[1, 5, 6, 7], [1, 9, 8, 7, 6, 5]]
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=families.PAD, eos_token_id=-1)
    pages = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)

    def together(prompts):
        results = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=pages, progress_bar=False
        )
        return [results[name] for name in sorted(results)]

    with vtprune.prune(model, "fastv", keep_ratio=0.5) as session:
        results = together(texts)
        (refused,) = together([families.batch("llava", model).singles[0]["input_ids"][0].tolist()])
        assert session.report is None
    for text, result in zip(texts, results, strict=True):
        expected = model.generate(torch.tensor([text]), max_new_tokens=3)[0, len(text) :]
        assert result.error is None and result.generated_tokens == expected.tolist()
    assert "placeholders of visual tokens" in refused.error and not refused.generated_tokens


def test_a_cache_of_pages_is_refused():
    model = families.shared("llava")
    inputs = families.batch("llava", model).singles[0]

    class Pages:
        """What continuous batching hands over has no layers."""

    with (
        vtprune.prune(model, "uniform", keep_ratio=0.5),
        pytest.raises(UnsupportedStageError, match="pruned with a Pages .continuous batching.; use generate"),
    ):
        model(**inputs, **{CACHE: Pages()})


# -- modes of torch ----------------------------------------------------------------------------------------------------


def gradients(model, inputs, labels) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.enable_grad():
        model(**inputs, labels=labels).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys() and len(got) > 50
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


@every
def test_inference_mode_then_normal_mode(name, method):
    """One session: tensors that were made in inference mode do not get into a graph, nor in the way of a cache."""
    model = families.build(name)
    inputs = families.batch(name, model, samples=2).inputs
    labels, more = answers(inputs), torch.tensor([[5], [6]])
    with vtprune.prune(model, method, keep_ratio=0.5):
        expected, greedy = gradients(model, inputs, labels), generate(model, inputs)
        logits = model(more, **{CACHE: model(**inputs, use_cache=True)[CACHE]}).logits
    with vtprune.prune(model, method, keep_ratio=0.5):
        with torch.inference_mode():
            assert_same(generate(model, inputs), greedy)
            generate(model, inputs, use_cache=False)
            cache = model(**inputs, use_cache=True)[CACHE]
        assert_gradients(gradients(model, inputs, labels), expected)
        assert torch.equal(model(more, **{CACHE: cache}).logits, logits)


def replays_hooks() -> bool:
    return "__call__" in vars(GradientCheckpointingLayer)


@pytest.mark.release
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    ("name", "method"), [*EVERY, ("llava", "mustdrop"), ("llava", "lazyllm"), ("qwen3_vl", "fastv")]
)
def test_gradient_checkpointing(name, method, reentrant):
    """Gradients as without it, and no cache comes back that no layer has filled; refused where hooks run twice."""
    model = families.build(name).train()
    inputs = families.batch(name, model, samples=2).inputs
    with vtprune.prune(model, method, keep_ratio=0.5) as session:
        expected, chosen = gradients(model, inputs, answers(inputs)), kept(session)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        if replays_hooks() and method != "mmtok":
            with pytest.raises(UnsupportedStageError, match="hooks of decoder layers once more"):
                gradients(model, inputs, answers(inputs))
            return
        assert_gradients(gradients(model, inputs, answers(inputs)), expected)
        assert kept(session) == chosen
        with torch.enable_grad():
            assert model(**inputs, use_cache=True, **{CACHE: DynamicCache()}).get(CACHE) is None


@diagonal
def test_dropout(name, method):
    """Pruning draws no numbers: what a training step drops by chance stays what it is."""
    model = families.build(name).train()
    for module in model.modules():
        for chance in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, chance, None), float):
                setattr(module, chance, 0.3)
    inputs = families.batch(name, model, samples=2).inputs

    def step():
        torch.manual_seed(0)
        logits = model(**inputs).logits
        return logits, torch.get_rng_state()

    logits, state = step()
    with vtprune.prune(model, method, keep_ratio=1.0):
        assert all(map(torch.equal, step(), (logits, state)))
    with vtprune.prune(model, method, keep_ratio=0.5) as session:
        pruned, chosen = step()[0], kept(session)
        assert torch.equal(step()[0], pruned) and kept(session) == chosen
    assert not torch.equal(pruned, logits)


@diagonal
def test_another_dtype_or_other_weights_in_a_session(name, method):
    """`to()`, `half()` and `load_state_dict()` take effect: nothing of the model is remembered."""
    model = families.build(name)
    inputs = families.batch(name, model, samples=2).inputs
    torch.manual_seed(0)
    weights = {key: value + 0.05 * torch.randn_like(value) for key, value in model.state_dict().items()}
    half = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    with vtprune.prune(model, method, keep_ratio=0.5):
        before = model(**inputs).logits
        model.load_state_dict(weights)
        loaded = model(**inputs).logits
        model.bfloat16()
        rounded = model(**half).logits
    with vtprune.prune(model, method, keep_ratio=0.5):
        assert torch.equal(model(**half).logits, rounded)
    fresh = families.build(name)
    fresh.load_state_dict(weights)
    with vtprune.prune(fresh, method, keep_ratio=0.5):
        assert torch.equal(fresh(**inputs).logits, loaded)
    assert not torch.allclose(before, loaded, atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_functional_call(name, method):
    model = families.build(name)
    inputs = families.batch(name, model, samples=2).inputs
    torch.manual_seed(0)
    weights = {key: value + 0.05 * torch.randn_like(value) for key, value in model.state_dict().items()}
    with vtprune.prune(model, method, keep_ratio=0.5):
        called = torch.func.functional_call(model, weights, (), inputs).logits
        model.load_state_dict(weights)
        assert torch.equal(called, model(**inputs).logits)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, pixel_values):
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        return self.model(**arguments, use_cache=False).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("record", [lambda *given: torch.jit.trace(*given, check_trace=False), torch.export.export])
@pytest.mark.parametrize("method", METHODS)
def test_tracing_and_exporting_are_refused(method, record):
    model = families.build("llava")
    inputs = families.batch("llava", model).singles[0]
    with (
        vtprune.prune(model, method, keep_ratio=0.5),
        pytest.raises(UnsupportedStageError, match="cannot be traced or exported while a vtprune session is on it"),
    ):
        record(Logits(model), (inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"]))


@pytest.mark.parametrize("method", METHODS)
def test_vmap_fails_loudly(method):
    """Lengths depend on what is in a tensor."""
    model = families.shared("llava")
    inputs = families.batch("llava", model).singles[0]
    pixels = torch.stack([inputs["pixel_values"], 2 * inputs["pixel_values"]])
    with vtprune.prune(model, method, keep_ratio=0.5), pytest.raises(RuntimeError, match="data-dependent control flow"):
        torch.vmap(lambda own: model(**(inputs | {"pixel_values": own}), use_cache=False).logits)(pixels)


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method):
    """Half precision where torch chooses it: near the recompute under the same autocast."""
    model = families.shared("llava")
    batch = families.batch("llava", model, samples=1)
    with torch.autocast("cpu", torch.bfloat16):
        with vtprune.prune(model, method, keep_ratio=0.5, positions="original") as session:
            logits = model(**batch.inputs).logits[0, -1]
        columns = [session.report.kept(0, layer) for layer in range(session.report.depth)]
        expected = recompute(model, batch.singles[0], torch.empty(0, dtype=torch.long), columns)[-1]
    assert nn.functional.cosine_similarity(logits.float(), expected.float(), dim=-1) > 0.98


# -- training, references, averages ------------------------------------------------------------------------------------


def log_probability(model, inputs, labels) -> Tensor:
    """(batch,) of each answer."""
    logits = model(**inputs).logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    picked = logits.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return picked.masked_fill(targets == -100, 0).sum(1)


def pairs(name: str, model) -> tuple[dict[str, Tensor], Tensor, list[int]]:
    """Two prompts, each with a chosen and a rejected answer, padded on the right; labels; tokens of each prompt."""
    batch = families.batch(name, model, samples=1)
    single = batch.singles[0]
    length = single["input_ids"].shape[1]
    replies = torch.tensor([[7, 9, 8], [11, 12, 0]])
    rows = {key: torch.cat([value, value]) for key, value in single.items()}
    more = {"input_ids": replies, "attention_mask": (replies != 0).long()}
    rows |= {key: torch.cat([rows[key], extra], 1) for key, extra in more.items()}
    for key in rows:
        if key.endswith("token_type_ids"):
            rows[key] = torch.cat([rows[key], torch.zeros_like(replies).to(rows[key])], 1)
    labels = torch.where(rows["attention_mask"].bool(), rows["input_ids"], -100)
    labels[:, :length] = -100
    return rows, labels, [length, length]


@diagonal
def test_preferences_with_a_reference_copy(name, method):
    """DPO: policy and a copy of it made before, each in a session of its own; log-probabilities as one by one."""
    policy = families.build(name)
    inputs, labels, lengths = pairs(name, policy)
    reference = copy.deepcopy(policy)
    with (
        vtprune.prune(policy, method, keep_ratio=0.5, prompt_length=lengths) as session,
        vtprune.prune(reference, method, keep_ratio=0.5, prompt_length=lengths),
        torch.enable_grad(),
    ):
        ours, theirs = log_probability(policy, inputs, labels), log_probability(reference, inputs, labels).detach()
        margin = (ours[0] - ours[1]) - (theirs[0] - theirs[1])
        loss = -nn.functional.logsigmoid(0.1 * margin)
        loss.backward()
        assert loss.item() == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
        assert kept(session)[: session.report.depth] == kept(session)[session.report.depth :]
    joint = {key: p.grad.clone() for key, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    media = len(inputs["pixel_values"]) // 2
    grids = {key: value[:1] for key, value in inputs.items() if key.endswith("grid_thw")}
    with vtprune.prune(policy, method, keep_ratio=0.5, prompt_length=lengths[0]), torch.enable_grad():
        for row, sign in ((0, -0.05), (1, 0.05)):
            width = int(inputs["attention_mask"][row].sum())
            own = {key: value[row : row + 1, :width] for key, value in inputs.items() if value.shape == labels.shape}
            own |= {"pixel_values": inputs["pixel_values"][:media]} | grids
            alone = log_probability(policy, own, labels[row : row + 1, :width])
            torch.testing.assert_close(alone[0], ours[row], atol=ATOL, rtol=0)
            (sign * alone).sum().backward()
    for key, gradient in joint.items():
        torch.testing.assert_close(gradient, dict(policy.named_parameters())[key].grad, atol=1e-5, rtol=1e-3)
    with vtprune.prune(policy, method, keep_ratio=0.5, strict=False), pytest.raises(VTPruneError, match="copied"):
        copy.deepcopy(policy)


@diagonal
def test_averages_of_weights(name, method):
    """EMA: a copy made before a session is updated inside it, and pruned in one of its own."""
    model = families.build(name)
    inputs = families.batch(name, model, samples=2).inputs
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)  # the first one copies
    before = {key: value.clone() for key, value in model.named_parameters()}
    with vtprune.prune(model, method, keep_ratio=0.5, strict=False):
        for parameter in model.parameters():
            parameter.mul_(1.1)
        averaged.update_parameters(model)
        with pytest.raises(VTPruneError, match="cannot be copied or pickled while a vtprune session is on it"):
            AveragedModel(model)
    expected = families.build(name)
    for key, parameter in expected.named_parameters():
        parameter.copy_((before[key] + before[key] * 1.1) / 2)
    results = []
    for own in (averaged.module, expected):
        with vtprune.prune(own, method, keep_ratio=0.5):
            results.append(own(**inputs).logits)
    torch.testing.assert_close(*results, atol=ATOL, rtol=0)


@pytest.mark.usefixtures("one_accelerator")
@diagonal
def test_trainer(name, method, tmp_path):
    """Losses and weights of two steps of transformers' Trainer are those of a loop by hand."""
    samples = []
    for single in families.batch(name, families.shared(name), samples=2).singles:
        samples.append(dict(single) | {"labels": answers(single)})

    def first(rows):
        return rows[0]

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,
        max_steps=2,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="sgd",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        gradient_checkpointing=True,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
    )
    model = families.build(name)
    trainer = Trainer(model, arguments, train_dataset=samples, data_collator=first)
    with vtprune.prune(model, method, keep_ratio=0.5), torch.enable_grad():
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    other = families.build(name).train()
    with vtprune.prune(other, method, keep_ratio=0.5), torch.enable_grad():
        for sample, logged in zip(samples, losses, strict=True):
            loss = other(**sample).loss
            loss.backward()
            assert logged == pytest.approx(loss.item(), abs=1e-3)
            for parameter in other.parameters():
                if parameter.grad is not None:
                    parameter.data -= 0.1 * parameter.grad
                    parameter.grad = None
    for got, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-3)


# -- wrappers and weights elsewhere ------------------------------------------------------------------------------------


@diagonal
def test_disk_offload(name, method, tmp_path):
    model = families.build(name)
    inputs = families.batch(name, model, samples=2).inputs
    with vtprune.prune(model, method, keep_ratio=0.5):
        expected = generate(model, inputs)
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    with vtprune.prune(model, method, keep_ratio=0.5):
        assert_same(generate(model, inputs), expected)


@pytest.fixture
def one_accelerator():
    """accelerate remembers the precision of a process's first Accelerator."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.usefixtures("one_accelerator")
@diagonal
def test_a_prepared_model(name, method, precision):
    """`Accelerator.prepare` puts autocast around `forward`."""
    model = families.build(name)
    inputs = families.batch(name, model, samples=2).inputs
    around = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    with vtprune.prune(model, method, keep_ratio=0.5) as session, around:
        expected, chosen = model(**inputs).logits.float(), kept(session)
    prepared = Accelerator(cpu=True, mixed_precision=precision).prepare(model)
    with vtprune.prune(prepared, method, keep_ratio=0.5) as session:
        assert torch.equal(prepared(**inputs).logits, expected)
    assert kept(session) == chosen


@pytest.mark.parametrize("kind", ["PrefixTuning", "PromptTuning"])
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_learnt_prompts_of_peft(name, kind):
    """A prefix in the KV cache, or embeddings before the prompt: as under a mask that hides what is gone."""
    peft = pytest.importorskip("peft")
    model = families.build(name)
    text = model.config.get_text_config()
    heads = text.num_key_value_heads if kind == "PrefixTuning" else text.num_attention_heads
    width = heads * text.head_dim if kind == "PrefixTuning" else text.hidden_size
    config = getattr(peft, f"{kind}Config")(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        num_layers=text.num_hidden_layers,
        token_dim=width,
        num_attention_heads=heads,
    )
    wrapper = peft.get_peft_model(model, config).eval()
    inputs = families.batch(name, model).singles[0]
    whole = wrapper(**inputs).logits
    for method in METHODS:
        with vtprune.prune(wrapper, method, keep_ratio=1.0):
            assert torch.equal(wrapper(**inputs).logits, whole)
        with vtprune.prune(wrapper, method, keep_ratio=0.5) as session:
            assert not torch.equal(wrapper(**inputs).logits, whole)
            assert session.report.keep_ratio < 1
    with vtprune.prune(wrapper, "uniform", keep_ratio=0.5, positions="original") as session:
        pruned = wrapper(**inputs).logits[0, -1]
    # The learnt tokens stand before the prompt, in the cache or in the call.
    gone = sorted(set(visual_columns(model, inputs).tolist()) - {c - 4 for c in session.report.kept(0).tolist()})
    mask = inputs["attention_mask"].index_fill(1, torch.tensor(gone), 0)
    decoder, length = vtprune.adapter_for(model).language_model, mask.shape[1]
    places = torch.arange(4, 4 + length) if kind == "PrefixTuning" else torch.arange(4 + length)
    given = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"position_ids": places[None]}), with_kwargs=True
    )
    expected = wrapper(**(inputs | {"attention_mask": mask})).logits[0, -1]
    given.remove()
    torch.testing.assert_close(pruned, expected, atol=ATOL, rtol=0)


@diagonal
def test_adapters_of_peft_turned_off_and_merged(name, method):
    """The base model as a reference (`disable_adapter`), and weights merged while a session is on."""
    peft = pytest.importorskip("peft")
    model = families.build(name)
    inputs = families.batch(name, model, samples=2).inputs
    with vtprune.prune(model, method, keep_ratio=0.5):
        base = model(**inputs).logits
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    wrapper = peft.get_peft_model(model, config).eval()
    with vtprune.prune(wrapper, method, keep_ratio=0.5):
        adapted = wrapper(**inputs).logits
        with wrapper.disable_adapter():
            torch.testing.assert_close(wrapper(**inputs).logits, base, atol=ATOL, rtol=0)
        wrapper.merge_adapter()
        torch.testing.assert_close(wrapper(**inputs).logits, adapted, atol=ATOL, rtol=0)
        wrapper.unmerge_adapter()
        torch.testing.assert_close(wrapper(**inputs).logits, adapted, atol=ATOL, rtol=0)
    assert not torch.allclose(adapted, base, atol=1e-2)


def by_torchao(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def by_bitsandbytes(model):
    from bitsandbytes.nn import Linear8bitLt

    decoder = vtprune.adapter_for(model).language_model
    for name, module in list(decoder.named_modules()):
        if isinstance(module, nn.Linear):
            quantised = Linear8bitLt(
                module.in_features, module.out_features, bias=module.bias is not None, has_fp16_weights=False
            )
            quantised.load_state_dict(module.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(decoder.get_submodule(parent), child, quantised.to("cpu"))


@pytest.mark.parametrize("quantise", [by_torchao, by_bitsandbytes])
@every
def test_quantised_weights(name, method, quantise):
    pytest.importorskip(quantise.__name__.removeprefix("by_"))
    model = families.build(name)
    inputs = families.batch(name, model).singles[0]
    quantise(model)
    with vtprune.prune(model, method, keep_ratio=0.5, positions="original") as session:
        output = generate(model, inputs)
    columns = [session.report.kept(0, layer) for layer in range(session.report.depth)]
    expected = recompute(model, inputs, output.sequences[0, -NEW:-1], columns)[-NEW:]
    torch.testing.assert_close(steps(output)[0], expected, atol=ATOL, rtol=0)


# -- the page ----------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/usages.md"


def own_tests(file: str) -> set[str]:
    """Names of the tests of a file, which is not run."""
    body = ast.parse((ROOT / file).read_text(), file).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_the_page_names_tests_that_exist():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith(("| Usage |", "| --- |"))]
    named = set()
    for row in rows:
        links = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row.split(" | ")[-1])
        assert links, f"a row names no test: {row}"
        named |= set(links)
    for file in sorted({file for file, _ in named}):
        known, wanted = own_tests(file), {test for other, test in named if other == file}
        assert wanted <= known, f"{file} has no {', '.join(sorted(wanted - known))}"
    here = Path(__file__).relative_to(ROOT).as_posix()
    own = own_tests(here) - {test_the_page_names_tests_that_exist.__name__}
    assert own == {test for file, test in named if file == here}, "a test of this file stands in no row"
