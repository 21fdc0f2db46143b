# SPDX-License-Identifier: Apache-2.0
"""Graphs of torch: made in a session they are right and few; a model that has one already is refused where it shows."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import vtprune
from vtprune.testing import families

CASES = [("llava", method) for method in ("uniform", "fastv", "transprune", "mmtok")] + [("qwen2_5_vl", "fastv")]
WAYS = {
    "a function": lambda model, backend: torch.compile(lambda **inputs: model(**inputs), backend=backend),
    "a module around it": lambda model, backend: torch.compile(model, backend=backend),
    "in place": lambda model, backend: (model.compile(backend=backend), model)[1],
    "its forward": lambda model, backend: torch.compile(model.forward, backend=backend),
}


MOST = {"llava": 24, "qwen2_5_vl": 48}
"""Graphs that may be made of a model with hooks on it."""
# Every case as a function, the first one in every way.
COMPILED = [(*case, "a function") for case in CASES] + [(*CASES[0], way) for way in list(WAYS)[1:]]


@pytest.fixture(autouse=True)
def empty_caches():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def two_requests(name: str) -> list[dict[str, torch.Tensor]]:
    """Of the same shape: other words, another image."""
    one = families.batch(name, families.shared(name)).singles[0]
    words = (one["input_ids"] >= families.FIRST_WORD) & (one["input_ids"] < families.IMAGE)
    pixels = torch.randn(one["pixel_values"].shape, generator=torch.Generator().manual_seed(5))
    other = torch.where(words, families.IMAGE + 1 - one["input_ids"], one["input_ids"])
    return [one, one | {"input_ids": other, "pixel_values": pixels}]


@pytest.mark.filterwarnings("ignore:(?s).*Dynamo:UserWarning")
@pytest.mark.parametrize(
    ("name", "method", "way"), [COMPILED[0], *(pytest.param(*one, marks=pytest.mark.slow) for one in COMPILED[1:])]
)
def test_what_is_compiled_in_a_session_is_right(name, method, way):
    """After the first call, requests of its shape compile nothing; hooks stand between graphs, and not in them."""
    model, requests, counter = families.build(name), two_requests(name), CompileCounter()
    session = vtprune.patch(model, method, keep_ratio=0.5)
    expected = [(model(**inputs).logits, session.report.kept(0).tolist()) for inputs in requests]
    compiled = WAYS[way](model, counter)
    graphs = []
    for inputs, (logits, kept) in zip(requests * 2, expected * 2, strict=True):
        torch.testing.assert_close(compiled(**inputs).logits, logits, atol=1e-5, rtol=0)
        assert session.report.kept(0).tolist() == kept
        graphs.append(counter.frame_count)
    assert expected[0][1] != expected[1][1] or method == "uniform"
    assert len(set(graphs)) == 1 and 0 < graphs[0] <= MOST[name]
    session.remove()


def traced(model) -> None:
    layer = model.get_decoder().layers[3].mlp
    model.get_decoder().layers[3].mlp = torch.jit.trace(layer, torch.randn(1, 2, 32))


def scripted(model) -> None:
    model.model.vision_tower.encoder.layers[1].layer_norm1 = torch.jit.script(torch.nn.LayerNorm(32))


def exported(model) -> None:
    program = torch.export.export(model.get_decoder().layers[3].mlp, (torch.randn(1, 2, 32),))
    model.get_decoder().layers[3].mlp = program.module()


def symbolic(model) -> None:
    model.model.multi_modal_projector = torch.fx.symbolic_trace(model.model.multi_modal_projector)


def features(model) -> None:
    model.model.get_image_features = torch.compile(model.model.get_image_features, backend="eager")


def a_layer(model) -> None:
    layers = model.get_decoder().layers
    layers[3] = torch.compile(layers[3], backend="eager")


def forward(model) -> None:
    model.get_decoder().forward = torch.compile(model.get_decoder().forward, backend="eager")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("change", [traced, scripted, exported, symbolic, features, a_layer, forward])
def test_a_model_with_a_graph_in_it_is_refused(change):
    model = families.build("llava")
    change(model)
    with pytest.raises(vtprune.UnsupportedModelError, match="compiled, traced or exported .*prune the uncompiled"):
        vtprune.prune(model, "fastv", keep_ratio=0.5)


def test_what_is_kept_out_of_graphs_is_none():
    model = families.build("llava")
    model.model.get_image_features = torch.compiler.disable(model.model.get_image_features)
    inputs = two_requests("llava")[0]
    with vtprune.prune(model, "uniform", keep_ratio=0.5) as session, torch.no_grad():
        model(**inputs)
    assert session.report.keep_ratio < 1


@pytest.mark.filterwarnings("ignore:(?s).*Dynamo:UserWarning")
def test_a_function_compiled_before_is_found_when_it_runs():
    """Nothing in the model shows it; but some of its hooks are reached, or none is and the session says so."""
    model, (inputs, _) = families.build("llava"), two_requests("llava")
    compiled = torch.compile(lambda **given: model(**given), backend="eager")
    compiled(**inputs)
    with vtprune.prune(model, "uniform", keep_ratio=0.5) as session:
        with pytest.raises(vtprune.UnsupportedModelError, match="ran without the hooks .*compiled before"):
            compiled(**inputs)
        assert session.report is None
        expected = model(**inputs).logits
        torch.compiler.reset()
        torch.testing.assert_close(compiled(**inputs).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_another_model_of_its_class_may_be_compiled():
    inputs, other = two_requests("llava")
    torch.compile(families.build("llava"), backend="eager")(**inputs)
    model = families.build("llava")
    with vtprune.prune(model, "fastv", keep_ratio=0.5) as session:
        model(**other)
    assert session.report.keep_ratio < 1
