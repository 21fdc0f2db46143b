# SPDX-License-Identifier: Apache-2.0
"""Promise 6: text is never dropped, positions are a choice; and the report says what really happened."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vtprune
from vtprune.methods.base import InLLM, _OneStage
from vtprune.transformers_private import CACHE

from . import models
from .methods import EVERY, acts, every_method, every_method_and_model, spec
from .models import IMAGE_TOKEN, batch_of_three, prompts
from .reference import ATOL, depth, generate, kept_columns, recompute

# What each method's reference implementation does with the positions of the survivors.
REFERENCE_POSITIONS = {
    "vtc_cls": "compact",
    "transprune": "compact",
    "mmtok": "compact",
    "divprune": "compact",
    "fastv": "original",
}


@pytest.mark.parametrize(("name", "positions"), REFERENCE_POSITIONS.items())
def test_default_positions_are_the_references(name, positions):
    assert vtprune.build_method({"name": name, "keep_ratio": 0.5}).positions == positions


def test_every_method_lets_positions_be_chosen():
    """Except what brings tokens back between those that stayed: there are no ranks to keep."""
    for name, cls in vtprune.list_methods().items():
        method = dict(spec(name)[0] if name in EVERY else {"name": name})
        assert vtprune.build_method(method | {"positions": "original"})
        if issubclass(cls, vtprune.Reviving):
            with pytest.raises(vtprune.ConfigError, match="positions"):
                vtprune.build_method(method | {"positions": "compact"})
        else:
            assert vtprune.build_method(method | {"positions": "compact"})


@pytest.mark.parametrize("name", ["uniform", "fastv", "transprune-ttv"])
def test_positions_make_a_difference(gqa, name):
    steps = {}
    for positions in ("original", "compact"):
        with vtprune.prune(gqa, spec(name, positions=positions)):
            steps[positions] = gqa(**batch_of_three(gqa).inputs()).logits[:, -1]
    assert (steps["original"] - steps["compact"]).abs().max() > 100 * ATOL


@pytest.mark.parametrize("padding_side", ["left", "right"])
@every_method_and_model()
def test_report_is_consistent(monkeypatch, model_name, name, padding_side):
    model = models.shared(model_name)
    batch = batch_of_three(model)
    inputs = batch.inputs(padding_side)
    selections, choose = [], _OneStage.choose

    def noted(method, tokens, *conditions):
        selections.append(choose(method, tokens, *conditions))
        return selections[-1]

    monkeypatch.setattr(_OneStage, "choose", noted)
    with vtprune.prune(model, spec(name)) as session:
        model(**inputs)
    report, merged = session.report, any(selection.sources is not None for selection in selections)
    assert report.counts.shape == (3, depth(model)) and not report.counts.is_floating_point()
    visual = inputs["input_ids"] == IMAGE_TOKEN
    for sample in range(3):
        columns = visual[sample].nonzero().flatten().tolist()
        alive = columns
        for layer in range(depth(model)):
            kept = report.kept(sample, layer).tolist()
            assert kept == sorted(set(kept))
            assert set(kept) <= set(alive)
            assert len(kept) == report.counts[sample, layer]
            sources = report.sources(sample, layer)
            assert len(sources) == len(columns)
            for index, column in enumerate(kept):
                members = [c for c, s in zip(columns, sources.tolist(), strict=True) if s == index]
                assert column in members
                assert members == [column] or merged
            assert all(-1 <= index < len(kept) for index in sources.tolist())
            alive = kept
    whole = torch.tensor([1, 2, 1])[:, None] * models.tokens_per_image(model)
    assert report.keep_ratio == pytest.approx(float(report.counts.sum() / (whole.sum() * depth(model))))
    assert torch.as_tensor(report.final_tokens).sum() == report.counts[:, -1].sum()
    assert report.to_dict() and str(report)


@pytest.mark.parametrize("name", ["vtc_cls", "divprune", "random", "uniform"])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.9])
def test_keep_ratio_before_the_llm_is_met(mha, name, ratio):
    with vtprune.prune(mha, name, keep_ratio=ratio) as session:
        mha(**batch_of_three(mha).inputs())
    assert session.report.keep_ratio == pytest.approx(ratio, abs=0.5 / 36 + 1e-6)


@pytest.mark.parametrize("name", ["fastv", "transprune"])
@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.9])
def test_keep_ratio_inside_the_llm_is_met_on_average(mha, name, ratio):
    with vtprune.prune(mha, name, keep_ratio=ratio) as session:
        mha(**batch_of_three(mha).inputs())
    assert session.report.keep_ratio == pytest.approx(ratio, abs=0.02)
    assert (session.report.counts[:, 0] == torch.tensor([36, 72, 36])).all()


@pytest.mark.parametrize("name", ["vtc_cls", "mmtok", "divprune", "random", "uniform"])
@pytest.mark.parametrize("count", [0, 1, 7, 25])
def test_keep_tokens_is_exact_per_image(gqa, name, count):
    with vtprune.prune(gqa, name, keep_tokens=count, strict=False) as session:
        gqa(**batch_of_three(gqa).inputs())
    assert session.report.counts[:, 0].tolist() == [count, 2 * count, count]


@pytest.mark.parametrize("name", ["vtc_cls", "transprune"])
def test_profiling_measures_and_changes_nothing(gqa, name):
    inputs = batch_of_three(gqa).inputs()
    with vtprune.prune(gqa, spec(name)) as session:
        plain = generate(gqa, inputs, new_tokens=2)
    assert session.report.timings is None
    with vtprune.prune(gqa, spec(name), profile=True) as session:
        profiled = generate(gqa, inputs, new_tokens=2)
    assert all(map(torch.equal, plain.logits, profiled.logits))
    timings = session.report.timings
    assert min(timings.encoder, timings.selector, timings.prefill) > 0


@every_method()
def test_prefill_flops_are_what_torch_counts(name):
    """One unpadded sample; eager attention, whose products can be counted."""
    model = models.shared("gqa", "eager")
    inputs = prompts(model, "ttIttIttt").inputs()
    with vtprune.prune(model, spec(name)) as session, FlopCounterMode(display=False, depth=None) as counter:
        model(**inputs)
    root = f"{type(model).__name__}.model.language_model.layers"
    counted = sum(
        sum(operators.values())
        for module, operators in counter.get_flop_counts().items()
        if module.startswith(root) and module.removeprefix(f"{root}.").isdigit()
    )
    # A selector's own rows are not in the report's prefill: they may add a little to what was counted.
    assert session.report.prefill_flops <= counted <= 1.1 * session.report.prefill_flops
    assert session.report.prefill_flops < session.report.unpruned_prefill_flops


@every_method()
def test_kv_bytes_are_what_the_cache_holds(gqa, name):
    batch = prompts(gqa, "ttIttIttt")
    with vtprune.prune(gqa, spec(name)) as session:
        output = generate(gqa, batch.inputs(), new_tokens=1)
    stored_bytes = sum(t.nbytes for layer in output[CACHE].layers for t in (layer.keys, layer.values))
    assert session.report.kv_bytes == stored_bytes
    plain = generate(gqa, batch.inputs(), new_tokens=1)[CACHE]
    assert session.report.unpruned_kv_bytes == sum(
        t.nbytes for layer in plain.layers for t in (layer.keys, layer.values)
    )


@pytest.mark.parametrize("name", ["vtc_cls", "transprune"])
def test_loss_of_the_answer(gqa, name):
    """`labels=`: the loss over tokens that follow text is that of the pruned sequence."""
    batch = batch_of_three(gqa)
    inputs = batch.inputs()
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    with vtprune.prune(gqa, spec(name, positions="original")) as session:
        loss = gqa(**inputs, labels=labels).loss
    answers = []
    for sample, ids in enumerate(batch.ids):
        kept = kept_columns(session.report, batch, sample, depth(gqa))
        logits = recompute(gqa, ids, batch.images[sample], kept, "original")[-4:-1]
        answers.append(torch.nn.functional.cross_entropy(logits, ids[-3:], reduction="none"))
    torch.testing.assert_close(loss, torch.cat(answers).mean(), atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["uniform", "zero", "fastv", "transprune"])
def test_loss_of_all_text(gqa, name):
    """A text token right after an image is predicted by the last token that survived before it."""
    batch = prompts(gqa, "ttIttItt")
    labels = batch.inputs()["input_ids"].masked_fill(batch.inputs()["input_ids"] == IMAGE_TOKEN, -100)
    with vtprune.prune(gqa, spec(name, positions="original")) as session:
        loss = gqa(**batch.inputs(), labels=labels).loss
    kept = kept_columns(session.report, batch, 0, depth(gqa))
    logits = recompute(gqa, batch.ids[0], batch.images[0], kept, "original")
    alive = (~logits.isnan().any(-1)).nonzero().flatten()
    targets = labels[0][alive]
    expected = torch.nn.functional.cross_entropy(logits[alive][:-1], targets[1:], ignore_index=-100)
    torch.testing.assert_close(loss, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["vtc_cls", "transprune"])
def test_loss_can_be_differentiated(name):
    model = models.build("gqa").train()
    inputs = batch_of_three(model).inputs()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    with torch.enable_grad(), vtprune.prune(model, spec(name)):
        model(**inputs, labels=labels).loss.backward()
    for part in ("model.vision_tower.encoder.layers.0", "model.multi_modal_projector", "model.language_model.layers.0"):
        gradients = [p.grad for p in model.get_submodule(part).parameters()]
        assert all(g is not None and g.isfinite().all() for g in gradients)
        assert any(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("which", [1, 5, torch.tensor([-1]), torch.tensor([0, 3, -2]), torch.tensor([1, 0])], ids=str)
@pytest.mark.parametrize("name", ["uniform", "fastv", "transprune"])
def test_logits_to_keep(gqa, name, which):
    """The last five are those of the prompt's last token and of four behind it, which decide nothing."""
    inputs = batch_of_three(gqa).inputs()
    behind = which - 1 if isinstance(which, int) else 0
    with vtprune.prune(gqa, spec(name), prompt_length=inputs["attention_mask"].sum(1) - behind):
        everything = gqa(**inputs).logits
    with vtprune.prune(gqa, spec(name)):
        some = gqa(**inputs, logits_to_keep=which).logits
    expected = everything[:, -which:] if isinstance(which, int) else everything[:, which]
    torch.testing.assert_close(some, expected, atol=ATOL, rtol=0)


@every_method(without=lambda name: not acts(name, InLLM))
def test_last_hidden_state_has_full_length(gqa, name):
    inputs = batch_of_three(gqa).inputs()
    with vtprune.prune(gqa, spec(name)):
        assert gqa.model(**inputs).last_hidden_state.shape[:2] == inputs["input_ids"].shape
