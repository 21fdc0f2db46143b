# SPDX-License-Identifier: Apache-2.0
"""The tokens of one image, chosen alone, are those that a session keeps of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vtprune
from vtprune.errors import VTPruneError
from vtprune.serving.plan import Plan, tokens_left
from vtprune.serving.selection import choose_tokens
from vtprune.serving.setting import method_of, spec_of
from vtprune.serving.signals import prompt_key, questions
from vtprune.stages.encoder import EncoderRecorder
from vtprune.testing import families

METHODS = ("divprune", "mmtok", "random", "pool", "visionzip")


def _chosen(name: str, spec: dict, kept: int | None = None) -> tuple[Tensor, Tensor]:
    """Embeddings of the visual tokens that are left of a prompt's image: in a server, and in a session."""
    model = families.shared(name)
    adapter = vtprune.adapter_for(model)
    inputs = families.batch(name, model).singles[0]
    method = method_of(spec_of(spec), adapter)
    recorder = EncoderRecorder(adapter, method.signals(adapter.shape), profile=False)
    hooks = list(recorder.install())
    adapter.encode("image", inputs)
    for hook in hooks:
        hook.remove()
    encoding = recorder.encoding("image", None)
    ids = inputs["input_ids"][0].tolist()
    features = list(encoding.features.split([len(medium) for medium in encoding.media]))
    left = []
    for index, medium in enumerate(encoding.media):
        total = len(medium)
        # One placeholder an image, as a request has it.
        starts = [place for place, token in enumerate(ids) if token == adapter.visual_token_ids["image"]]
        unexpanded = [token for place, token in enumerate(ids) if place not in starts or place - 1 not in starts]
        text = tuple(questions(unexpanded, "image", len(encoding.media), adapter)[index])
        plan = Plan(spec, kept or tokens_left(medium, method, 1.0), total, text, prompt_key(ids, adapter))
        embed = model.get_input_embeddings()
        width = features[index].shape[1]
        left.append(choose_tokens(method, plan, features[index], width, recorder, encoding, index, embed))
    seen: list[Tensor] = []
    hook = adapter.decoder_layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with vtprune.prune(model, [method]) as session:
        model(**inputs)
    hook.remove()
    alive = session.report.kept(0, 0)
    columns = sorted(
        {*range(len(ids))} - {p for p, token in enumerate(ids) if token in adapter.visual_token_ids.values()}
    )
    order = sorted([*columns, *alive.tolist()])
    places = [order.index(column) for column in alive.tolist()]
    return torch.cat(left), seen[0][0, places]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_session_keeps_the_same_tokens(name, method):
    if method == "visionzip" and name != "llava":
        pytest.skip("it reads a CLS token")
    served, session = _chosen(name, {"name": method, "keep_ratio": 0.4})
    assert served.shape == session.shape
    torch.testing.assert_close(served, session, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_count_that_does_not_fit_the_prompt_is_an_error():
    with pytest.raises(VTPruneError, match="has room for 3"):
        _chosen("llava", {"name": "divprune", "keep_ratio": 0.4}, kept=3)


@torch.no_grad()
def test_what_lies_behind_the_width_goes_with_its_token():
    """DeepStack: of tokens that merge, the mean of all."""
    model = families.shared("llava")
    adapter = vtprune.adapter_for(model)
    inputs = families.batch("llava", model).singles[0]
    method = method_of(spec_of({"name": "pool", "keep_ratio": 0.25}), adapter)
    recorder = EncoderRecorder(adapter, (), profile=False)
    hooks = list(recorder.install())
    adapter.encode("image", inputs)
    for hook in hooks:
        hook.remove()
    encoding = recorder.encoding("image", None)
    medium = encoding.media[0]
    features = encoding.features[: len(medium)]
    plan = Plan({"name": "pool"}, tokens_left(medium, method, 1.0), len(medium))
    doubled = torch.cat([features, features], 1)
    left = choose_tokens(method, plan, doubled, features.shape[1], recorder, encoding, 0, model.get_input_embeddings())
    first, behind = left.chunk(2, 1)
    torch.testing.assert_close(first, behind)  # pooling averages, too


@torch.no_grad()
def test_text_between_visual_tokens_stays_where_it_was():
    """Before the token that it stood before, or the next one left."""
    model = families.shared("llava")
    adapter = vtprune.adapter_for(model)
    recorder = EncoderRecorder(adapter, (), profile=False)
    hooks = list(recorder.install())
    adapter.encode("image", families.batch("llava", model).singles[0])
    for hook in hooks:
        hook.remove()
    encoding = recorder.encoding("image", None)
    medium, embed = encoding.media[0], model.get_input_embeddings()
    features = torch.nn.functional.pad(encoding.features[: len(medium)], (0, 3), value=1)
    spec = {"name": "uniform", "keep_ratio": 0.5}
    method = method_of(spec_of(spec), adapter)
    kept, width = tokens_left(medium, method, 1.0), features.shape[1] - 3
    places, words = (1, len(medium) // 2, len(medium) - 1), ((5, 6), (7,), (8, 9, 10))
    with_text, without = (
        choose_tokens(
            method, Plan(spec, kept, len(medium), within=within), features, width, recorder, encoding, 0, embed
        )
        for within in (tuple(zip(places, words, strict=True)), ())
    )
    is_text = (with_text[:, width:] == 0).all(1)
    assert torch.equal(with_text[~is_text], without)
    torch.testing.assert_close(with_text[is_text][:, :width], embed(torch.tensor([5, 6, 7, 8, 9, 10])))
    # How many tokens that are left stand before each word: those that stood before it.
    number = {tuple(feature.tolist()): index for index, feature in enumerate(features)}
    alive = [number[tuple(feature.tolist())] for feature in without]
    before = (~is_text).cumsum(0)[is_text].tolist()
    assert before == [
        sum(index < place for index in alive) for place, ids in zip(places, words, strict=True) for _ in ids
    ]
