# SPDX-License-Identifier: Apache-2.0
"""Promise 4: after the session the model is what it was; sessions do not get into one another's way."""

import threading

import pytest
import torch

import vtprune
from vtprune.testing.traces import fingerprint

from . import models
from .methods import every_method, spec
from .models import batch_of_three
from .reference import assert_recomputed, generate


@pytest.fixture
def warm():
    """A model of its own that ran once: transformers installs its own capturing hooks on first use, for good."""
    model = models.build("gqa")
    generate(model, batch_of_three(model).inputs(), new_tokens=2)
    return model


class Boom(Exception):
    pass


@every_method()
def test_model_is_what_it_was(warm, name):
    inputs = batch_of_three(warm).inputs()
    before, weights = fingerprint(warm), {k: v.clone() for k, v in warm.state_dict().items()}
    plain = generate(warm, inputs)
    with vtprune.prune(warm, spec(name)):
        pruned = generate(warm, inputs)
    assert fingerprint(warm) == before
    assert weights.keys() == warm.state_dict().keys()
    assert all(torch.equal(weights[k], v) for k, v in warm.state_dict().items())
    after = generate(warm, inputs)
    assert all(map(torch.equal, plain.logits, after.logits))
    assert not torch.equal(plain.logits[0], pruned.logits[0])


@pytest.mark.parametrize("name", ["vtc_cls", "mmtok", "fastv", "transprune", "vtc_cls+fastv"])
def test_exception_in_the_body(warm, name):
    before = fingerprint(warm)
    with pytest.raises(Boom), vtprune.prune(warm, spec(name)):
        generate(warm, batch_of_three(warm).inputs(), new_tokens=1)
        raise Boom
    assert fingerprint(warm) == before


@pytest.mark.parametrize("where", ["model.vision_tower.encoder.layers.3", "model.language_model.layers.3", "lm_head"])
@pytest.mark.parametrize("name", ["vtc_cls", "mmtok", "fastv", "transprune", "vtc_cls+fastv"])
def test_exception_in_the_middle_of_a_forward(warm, name, where):
    """The session ends clean, and one that goes on after a failed forward prunes correctly."""
    before = fingerprint(warm)
    batch = batch_of_three(warm)

    def fail(*_):
        raise Boom

    with vtprune.prune(warm, spec(name, positions="original")) as session:
        handle = warm.get_submodule(where).register_forward_hook(fail)
        with pytest.raises(Boom):
            generate(warm, batch.inputs(), new_tokens=2)
        handle.remove()
        output = generate(warm, batch.inputs())
    assert fingerprint(warm) == before
    assert_recomputed(warm, batch, session.report, output, "original")


def test_remove_is_idempotent(warm):
    before = fingerprint(warm)
    session = vtprune.patch(warm, "uniform", keep_ratio=0.5)
    generate(warm, batch_of_three(warm).inputs(), new_tokens=2)
    session.remove()
    session.remove()
    assert fingerprint(warm) == before
    assert session.report.keep_ratio < 0.6  # the report outlives the session


def test_other_peoples_hooks_survive(warm):
    calls = []
    handle = warm.model.language_model.layers[2].register_forward_hook(lambda *_: calls.append(1))
    with vtprune.prune(warm, spec("fastv")):
        late = warm.model.language_model.register_forward_hook(lambda *_: calls.append(2))
        generate(warm, batch_of_three(warm).inputs(), new_tokens=2)
    calls.clear()
    generate(warm, batch_of_three(warm).inputs(), new_tokens=1)
    assert calls == [1, 2]
    handle.remove()
    late.remove()


def test_nested_sessions_are_refused_and_the_outer_one_goes_on(warm):
    before = fingerprint(warm)
    batch = batch_of_three(warm)
    with vtprune.prune(warm, spec("uniform", positions="original")) as outer:
        inside = fingerprint(warm)
        with pytest.raises(vtprune.VTPruneError, match="session|pruned"), vtprune.prune(warm, spec("fastv")):
            pass
        assert fingerprint(warm) == inside
        output = generate(warm, batch.inputs())
    assert fingerprint(warm) == before
    assert_recomputed(warm, batch, outer.report, output, "original")


def test_sequential_sessions(warm):
    batch = batch_of_three(warm)
    for name in ("fastv", "vtc_cls", "transprune", "fastv"):
        with vtprune.prune(warm, spec(name, positions="compact")) as session:
            output = generate(warm, batch.inputs())
        assert_recomputed(warm, batch, session.report, output, "compact")


@pytest.mark.parametrize(
    "bad", [{"name": "fastv", "layer": 99, "keep_ratio": 0.5}, {"name": "mmtok"}, {"name": "nope"}]
)
def test_refused_methods_leave_nothing_behind(warm, bad):
    before = fingerprint(warm)
    with pytest.raises(vtprune.VTPruneError):
        vtprune.patch(warm, bad)
    assert fingerprint(warm) == before
    with vtprune.prune(warm, spec("uniform")):  # and the model is free for a session
        generate(warm, batch_of_three(warm).inputs(), new_tokens=1)


def test_two_models_in_two_threads():
    names = {"mha": "fastv", "gqa": "vtc_cls+fastv"}
    batches = {m: batch_of_three(models.shared(m)) for m in names}
    own = {m: models.build(m) for m in names}
    results, errors = {}, []
    barrier = threading.Barrier(2)

    def work(model_name):
        try:
            model = own[model_name]
            with torch.no_grad(), vtprune.prune(model, spec(names[model_name], positions="original")) as session:
                for _ in range(4):
                    barrier.wait(timeout=60)
                    output = generate(model, batches[model_name].inputs())
            results[model_name] = session.report, output
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    for model_name, (report, output) in results.items():
        assert_recomputed(models.shared(model_name), batches[model_name], report, output, "original")


def test_sessions_on_two_models_overlap_in_any_order():
    first, second = models.build("mha"), models.build("gqa")
    batches = [batch_of_three(first), batch_of_three(second)]
    one = vtprune.patch(first, spec("fastv", positions="original"))
    two = vtprune.patch(second, spec("vtc_cls", positions="original"))
    output = generate(first, batches[0].inputs())
    one.remove()
    other = generate(second, batches[1].inputs())
    two.remove()
    assert_recomputed(first, batches[0], one.report, output, "original")
    assert_recomputed(second, batches[1], two.report, other, "original")


def test_an_adapter_that_fails_half_way_leaves_nothing(gqa):
    """Hooks go on one by one; if one cannot, those before it come off."""
    before = fingerprint(gqa)

    class Broken(type(vtprune.adapter_for(gqa))):
        def encoder_attention(self, layer):
            raise AttributeError("no such module")

    session = vtprune.prune(gqa, spec("vtc_cls"))
    session.adapter.__class__ = Broken
    with pytest.raises(AttributeError, match="no such module"):
        session.install()
    assert fingerprint(gqa) == before
    with vtprune.prune(gqa, spec("vtc_cls")):
        pass
