# SPDX-License-Identifier: Apache-2.0
"""Promises 1 to 6 for every method on every family, with both attention back ends, alone and in a padded batch."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import vtprune
from vtprune.methods.base import InEncoder, InLLM
from vtprune.methods.in_layers import InLayers
from vtprune.testing import families
from vtprune.testing.media import AUDIO
from vtprune.testing.recompute import Merges, look, recompute, visual_columns
from vtprune.testing.traces import back_ends, fingerprint
from vtprune.transformers_private import CACHE, has_keys, keeps_prompt, key_sources, told_by_token

from . import matrix
from .lazy_reference import cuts_of, lazy_recompute, separators
from .matrix import CELLS, COUNT_PADDING, MEANS_OF_PATCHES, NO_LOOK_AHEAD, in_turns, refusal, turn
from .methods import (
    METHODS,
    acts,
    attends_in_llm,
    evicts,
    keep_everything,
    last_cut,
    looks_ahead,
    needs_cls,
    needs_grid,
    numbered,
    reads_encoder,
    revives,
    spec,
)

ATOL = 1e-4
NEW = 4
POSITIONS = {"sdpa": "original", "eager": "compact"}
PAGE = Path(__file__).parents[2] / "docs" / "support.md"

both_attentions = pytest.mark.parametrize("attention", list(POSITIONS))


class Unpatched(NamedTuple):
    """A model that ran once, and what it gave: transformers installs its own hooks on first use, for good."""

    model: Any
    batch: families.Batch
    output: Any
    state: dict


def placeholders(batch: families.Batch) -> list[int]:
    """Ids that an answer must not have: models replace them, also where no medium is given."""
    return [*batch.visual_ids, AUDIO]


def generate(model, batch: families.Batch, inputs: dict[str, Tensor]):
    """Greedy; placeholders, which have no meaning in an answer, suppressed."""
    return model.generate(
        **inputs,
        max_new_tokens=NEW,
        suppress_tokens=placeholders(batch),
        output_logits=True,
        return_dict_in_generate=True,
    )


@functools.cache
def unpatched(name: str, attention: str, media: str) -> Unpatched:
    model = families.shared(name, attention)
    batch = families.batch(name, model, media=media)
    output = generate(model, batch, batch.inputs)
    return Unpatched(model, batch, output, fingerprint(model))


def steps(output) -> Tensor:
    """(batch, new tokens, vocabulary)"""
    return torch.stack(output.logits, 1)


def asserts_no_attentions_are_asked_for(module, args, kwargs):
    assert not kwargs.get("output_attentions")


def kept_columns(report, sample: int, first: int) -> list[Tensor]:
    """`report.kept` of one sample in every layer, as columns of its own unpadded prompt."""
    return [report.kept(sample, layer) - first for layer in range(report.depth)]


def cached_columns(report, sample: int, first: int) -> list[Tensor]:
    """The same of `report.cached`."""
    return [report.cached(sample, layer) - first for layer in range(report.depth)]


def check_cache(output, report, batch: families.Batch, samples: range) -> None:
    """Every cache layer holds the visual tokens that the report says are there, all text, and nothing else."""
    assert report.counts.shape == (len(samples), len(output[CACHE].layers))
    text = [batch.singles[s]["input_ids"].shape[1] - len(report.visual[i]) for i, s in enumerate(samples)]
    for index, layer in enumerate(output[CACHE].layers):
        if not has_keys(layer):
            continue
        longest = max(len(report.cached(i, index)) + n for i, n in enumerate(text))
        if keeps_prompt(layer):
            assert layer.prefill_keys.shape[-2] == longest and layer.keys.shape[-2] == NEW - 1
            continue
        assert layer.keys.shape[-2] == layer.values.shape[-2] == longest + NEW - 1


def encoder_merges(run: Unpatched, sample: int, report, methods) -> Merges:
    """What a method inside the encoder's layers made of all visual tokens; `tests/encoders` has it written out."""
    inside = [part for part in methods if acts(part["name"], InLayers)]
    with vtprune.prune(run.model, inside, strict=False):
        vision = look(run.model, run.batch.singles[sample])
    sources = [report.sources(sample, layer) for layer in range(report.depth)]
    return Merges([(0, vision.columns, vision.features)], sources)


def expected_steps(
    run: Unpatched, sample: int, generated: Tensor, kept, positions, sources=None, cached=None, merges=None
) -> Tensor:
    """(NEW, vocabulary): recomputed logits of each step of one sample's generation."""
    inputs = run.batch.singles[sample]
    visual = visual_columns(run.model, inputs)
    for earlier, later in zip([visual, *kept], kept, strict=False):
        assert torch.isin(later, earlier).all() and (later.diff() > 0).all()
    return recompute(run.model, inputs, generated[:-1], kept, positions, sources, cached, merges)[-NEW:]


def check_steps(run: Unpatched, sample: int, logits: Tensor, generated: Tensor, expected: Tensor) -> None:
    """Every step of one sample's generation is the expected one."""
    torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0, msg=lambda m: f"sample {sample}: {m}")
    allowed = expected.clone()
    allowed[:, placeholders(run.batch)] = float("-inf")
    assert generated.tolist() == allowed.argmax(-1).tolist()


def check_sample(run: Unpatched, sample: int, logits: Tensor, generated: Tensor, kept, positions) -> None:
    """The same for a method that merges nothing, and evicts nothing from the cache."""
    check_steps(run, sample, logits, generated, expected_steps(run, sample, generated, kept, positions))


def check_revival(run: Unpatched, sample: int, logits: Tensor, generated: Tensor, report, row: int) -> None:
    """Every step of one sample's generation is the one of an algorithm that computes all anew, and so is the cache.

    row: the sample's number in the report.
    """
    inputs, first = run.batch.singles[sample], run.batch.first_column(sample) if report.samples > 1 else 0
    lines = separators(run.model, inputs)
    expected = lazy_recompute(run.model, inputs, generated[:-1], cuts_of(report, row, len(lines)))
    assert expected.revived, "nothing came back"
    torch.testing.assert_close(logits, expected.logits, atol=ATOL, rtol=0, msg=lambda m: f"sample {sample}: {m}")
    expected.logits[:, placeholders(run.batch)] = float("-inf")
    assert generated.tolist() == expected.logits.argmax(-1).tolist()
    for layer, cached in enumerate(expected.cached):
        assert (report.cached(row, layer) - first).tolist() == sorted([*cached, *lines])


def _cells():
    """Every cell with the first back end, and every method on every family once with the second one, with images or,
    where the family takes them, videos or mixed prompts, in turns; on kindred families with one of them in turns.

    The default run has every method on every family once, and a quarter of those with the second back end. Of kindred
    families it has an eighth.
    """
    for number, (name, media, method) in enumerate(CELLS):
        kindred = name in families.KINDRED
        for attention in [list(POSITIONS)[number % 2]] if kindred else POSITIONS:
            first, turn_comes = attention == "sdpa" or kindred, in_turns(name, media, method)
            if not first and not turn_comes:
                continue
            marks = [] if turn_comes and (first or number % 4 == 0) else [pytest.mark.slow]
            yield pytest.param(name, media, method, attention, marks=marks, id=f"{name}-{media}-{method}-{attention}")


def samples_alone(name: str, method: str, attention: str, samples: int) -> range:
    """Samples that run alone, too: with the first back end all, unless the family is kindred; else one, in turns."""
    if method == "dart" and name in COUNT_PADDING:
        return range(0)
    if attention == "sdpa" and name not in families.KINDRED:
        return range(samples)
    one = turn(name, method) % samples
    return range(one, one + 1)


@pytest.mark.parametrize(("name", "media", "method", "attention"), [*_cells()])
def test_cell(name, media, method, attention):
    run = unpatched(name, attention, media)
    model, batch, methods = run.model, run.batch, spec(method, positions=POSITIONS[attention])
    if refusal(model, methods) is not None:
        assert fingerprint(model) == run.state
        return

    if name not in families.KINDRED or in_turns(name, media, method):
        with vtprune.prune(model, keep_everything(method)):
            untouched = generate(model, batch, batch.inputs)
        assert torch.equal(untouched.sequences, run.output.sequences)
        assert torch.equal(steps(untouched), steps(run.output))

    inside_encoder = acts(method, InLayers)

    before = back_ends(model)
    with vtprune.prune(model, methods) as session:
        watches = [
            module.register_forward_pre_hook(asserts_no_attentions_are_asked_for, with_kwargs=True)
            for module in (model.base_model, session.adapter.language_model)
        ]
        together, report = generate(model, batch, batch.inputs), session.report
        alone = {
            sample: (generate(model, batch, batch.singles[sample]), session.report)
            for sample in samples_alone(name, method, attention, len(batch))
        }
        assert back_ends(model) == before
        for watch in watches:
            watch.remove()
    assert fingerprint(model) == run.state

    assert report.keep_ratio < 0.75 or (inside_encoder and media in MEANS_OF_PATCHES.get(name, ()))
    if revives(method):
        for sample in range(len(batch)):
            ids = together.sequences[sample, -NEW:]
            check_revival(run, sample, steps(together)[sample], ids, report, sample)
        for sample, (single, own_report) in alone.items():
            check_revival(run, sample, steps(single)[0], single.sequences[0, -NEW:], own_report, 0)
        return
    check_cache(together, report, batch, range(len(batch)))
    for sample in range(len(batch)):
        kept = kept_columns(report, sample, batch.first_column(sample))
        cached = cached_columns(report, sample, batch.first_column(sample))
        ids = together.sequences[sample, -NEW:]
        sources = merges = None
        if inside_encoder:
            merges = encoder_merges(run, sample, report, methods)
        else:
            sources = report.sources(sample, 0)
        expected = expected_steps(run, sample, ids, kept, numbered(methods), sources, cached, merges)
        check_steps(run, sample, steps(together)[sample], ids, expected)
        if sample not in alone:
            continue
        single, own_report = alone[sample]
        for ours, own in ((kept, kept_columns(own_report, 0, 0)), (cached, cached_columns(own_report, 0, 0))):
            assert [k.tolist() for k in ours] == [k.tolist() for k in own], "alone, other tokens are kept"
        check_cache(single, own_report, batch, range(sample, sample + 1))
        assert torch.equal(single.sequences[0, -NEW:], ids), "alone, the answer is another one"
        check_steps(run, sample, steps(single)[0], ids, expected)


def on_families(names: Iterable[str]):
    """Parametrises over families and one method of each stage, where the language model takes one inside."""
    inside = {name: "fastv" if name in NO_LOOK_AHEAD else "transprune" for name in families.PRUNED_INSIDE}
    cells = [(name, method) for name in names for method in ("uniform", inside.get(name)) if method is not None]
    return pytest.mark.parametrize(("name", "method"), cells)


@on_families(name for name in families.NAMES if name not in families.IMAGES_FIRST)
def test_samples_with_and_without_images(name, method):
    run = unpatched(name, "sdpa", "sparse")
    with vtprune.prune(run.model, spec(method, positions="compact")) as session:
        output = generate(run.model, run.batch, run.batch.inputs)
    assert session.report.counts[1].sum() == 0
    for sample in range(len(run.batch)):
        kept = kept_columns(session.report, sample, run.batch.first_column(sample))
        logits, ids = steps(output)[sample], output.sequences[sample, -NEW:]
        check_sample(run, sample, logits, ids, kept, "compact")


@functools.cache
def windowed(name: str, attention: str) -> Unpatched:
    model = families.build(name, attention, sliding_window=12)
    batch = families.batch(name, model)
    return Unpatched(model, batch, None, {})


@both_attentions
@pytest.mark.parametrize("keep_ratio", [0.3, 0.9])
@pytest.mark.parametrize("method", ["uniform", "fastv", "transprune"])
@pytest.mark.parametrize(
    "name",
    ["gemma3", "paligemma2", "pixtral", "mistral3", "step3p7", "aya_vision", "gemma4", "gemma4_31b", "gemma4_unified"],
)
def test_sliding_windows_count_the_tokens_that_are_there(name, method, keep_ratio, attention):
    """Prompts, and at 0.9 also images, longer than the window after pruning, too."""
    run, positions = windowed(name, attention), POSITIONS[attention]
    methods = spec(method, positions=positions, keep_ratio=keep_ratio)
    with vtprune.prune(run.model, methods) as session:
        output = generate(run.model, run.batch, run.batch.inputs)
    for sample in range(len(run.batch)):
        kept = kept_columns(session.report, sample, run.batch.first_column(sample))
        logits, ids = steps(output)[sample], output.sequences[sample, -NEW:]
        check_sample(run, sample, logits, ids, kept, positions)


@on_families(families.NAMES)
def test_right_padding(name, method):
    """Logits of all surviving columns of a forward call, in place, as one scores with."""
    model = families.shared(name)
    batch = families.batch(name, model, media=families.MEDIA[name][-1], padding_side="right")
    with vtprune.prune(model, spec(method, positions="original")) as session:
        logits = model(**batch.inputs).logits
    for sample, inputs in enumerate(batch.singles):
        kept = kept_columns(session.report, sample, 0)
        expected = recompute(model, inputs, torch.empty(0, dtype=torch.long), kept)
        alive = ~expected.isnan().any(-1)
        assert 0 < int(alive.sum()) < len(alive)
        got = logits[sample, : len(expected)][alive]
        torch.testing.assert_close(got, expected[alive], atol=ATOL, rtol=0)


SHORTER_TOWERS = {
    "llava",
    "llava_next",
    "video_llava",
    "paligemma",
    "paligemma2",
    "deepseek_vl",
} | MEANS_OF_PATCHES.keys()
"""Families in whose vision towers the sequence can get shorter: one image a sequence, and no mask."""

WITH_CLS = {"clip_vision_model", "internvl_vision", "llama4_vision_model", "qianfan_ocr_vision"}
"""Vision towers that have a CLS token."""


@pytest.mark.parametrize("name", families.NAMES)
def test_only_what_needs_a_cls_token_is_refused(name):
    """The matrix would be easy to pass if everything were refused."""
    model = families.shared(name)
    refused = {method for method in METHODS if refusal(model, spec(method)) is not None}
    adapter = vtprune.adapter_for(model)
    has_cls = (
        adapter.vision_config.model_type in WITH_CLS or name == "perception_lm"
    )  # one of timm's, which may have it
    kinds = getattr(adapter.language_model.config, "layer_types", None) or ()
    slides = bool({"sliding_attention", "chunked_attention"} & {*kinds})
    slides |= len(set(adapter.rope_kinds)) > 1
    slides |= bool(told_by_token(adapter.decoder_layers[0], adapter.text_config))
    without_cls = set() if has_cls else {method for method in METHODS if needs_cls(method)}
    expected = without_cls | {method for method in METHODS if revives(method) and slides}
    if name not in SHORTER_TOWERS:
        expected |= {method for method in METHODS if acts(method, InLayers)}
    if not adapter.merges_in_encoder:
        expected |= {method for method in METHODS if acts(method, InEncoder)}
    unread = dict(layers=bool(adapter.layers_unread), features=bool(adapter.features_unread), has_cls=has_cls)
    expected |= {method for method in METHODS.keys() - without_cls if reads_encoder(method, **unread)}
    expected |= {method for method in METHODS if adapter.gridless and needs_grid(method)}
    if name in families.CARRY_STATE:
        expected |= {method for method in METHODS if acts(method, InLLM) or evicts(method)}
    if families.FAMILIES[name].attention_unread:
        expected |= {method for method in METHODS if attends_in_llm(method)}
    shape = adapter.shape
    sources = key_sources(adapter.language_model.config, shape.decoder_layers)
    if read_later := {source for layer, source in enumerate(sources) if source != layer}:
        expected |= {method for method in METHODS if last_cut(method, shape) > min(read_later)}
    if name in NO_LOOK_AHEAD:
        expected |= {method for method in METHODS if looks_ahead(method)}
    assert refused == expected


def test_support_page_is_current(request):
    if request.config.getoption("--update-support", default=False):
        assert not request.session.testsfailed, "not written: the page would call cells working that failed"
        PAGE.write_text(matrix.page())
    current = PAGE.read_text() if PAGE.exists() else ""
    assert current == matrix.page(), f"{PAGE} is stale: pytest tests/conformance/test_matrix.py --update-support"
