# SPDX-License-Identifier: Apache-2.0
"""`vtprune bench` on tiny shapes: what it counts, how it computes from times, and that it runs what it says.

No assertion depends on how long anything takes.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_eval
import torch
from typer.testing import CliRunner

import vtprune
import vtprune.eval
from vtprune import cost
from vtprune.cli import app
from vtprune.errors import ConfigError
from vtprune.eval.bench import lines as bench_lines
from vtprune.eval.bench import passes, path, rounds, run, table
from vtprune.eval.bench.config import BenchConfig, load_config
from vtprune.eval.bench.linear import use_onednn
from vtprune.eval.bench.passes import Pass, one_pass
from vtprune.eval.bench.path import decode, encode, grow, prefill
from vtprune.eval.bench.rows import Row
from vtprune.eval.bench.shapes import SHAPES, Shape, build_model, random_inputs
from vtprune.eval.bench.stopwatch import Spread, paired, peak_bytes, timed
from vtprune.eval.pages.report import write_report
from vtprune.eval.results.records import to_line
from vtprune.transformers_private import CACHE

TEXT = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 4,
}
SIGLIP = CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False}


def llava(vision, **fields):
    config = {"model_type": "llava", "vision_config": vision, "text_config": TEXT, "image_token_index": 63, **fields}
    return Shape(config, visual_tokens=36, pixels=(3, 24, 24))


TINY = {
    "tiny": llava(CLIP),
    "tiny-siglip": llava(SIGLIP, vision_feature_layer=-1, vision_feature_select_strategy="full"),
}


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch):
    for name, shape in TINY.items():
        monkeypatch.setitem(SHAPES, name, shape)


@pytest.fixture(scope="module")
def model():
    return build_model(TINY["tiny"], None, "float32", "sdpa", "cpu")


def config(**fields):
    given = {"shape": "tiny", "text_tokens": 10, "repeats": 2, "output_tokens": (1, 4), "steps": 1, **fields}
    return load_config(**given)


# -- shapes -----------------------------------------------------------------------------------------------------------

BILLIONS = {
    "llava-1.5-7b": 7.06,
    "llava-1.5-13b": 13.35,
    "llava-next-7b": 7.06,
    "llava-onevision-7b": 8.03,
    "qwen2.5-vl-7b": 8.29,
    "internvl3-8b": 7.94,
}
"""Parameters of the published models."""


@pytest.mark.parametrize("name", BILLIONS)
def test_a_shape_has_as_many_parameters_as_the_published_model(name):
    from transformers import AutoConfig, AutoModelForImageTextToText

    fields = dict(SHAPES[name].config)
    with torch.device("meta"):
        built = AutoModelForImageTextToText.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    assert sum(p.numel() for p in built.parameters()) / 1e9 == pytest.approx(BILLIONS[name], abs=0.01)


def thin(shape):
    """The same geometry with layers a few numbers wide."""
    vision = shape.config["vision_config"]
    if "depth" in vision:
        narrow = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 128}
        narrow["fullatt_block_indexes"] = [1]
    else:
        narrow = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 128, "intermediate_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1}
    parts = {"vision_config": vision | narrow, "text_config": shape.config["text_config"] | text}
    return Shape(**{**vars(shape), "config": {**shape.config, **parts}})


@pytest.mark.parametrize("name", BILLIONS)
@torch.inference_mode()
def test_the_image_of_a_shape_becomes_as_many_tokens_as_it_says(name):
    shape = thin(SHAPES[name])
    built = build_model(shape, 2, "float32", "sdpa", "cpu")
    inputs = random_inputs(shape, built, batch=2, text_tokens=6)
    with vtprune.prune(built, "uniform", keep_ratio=0.5) as session:
        ids, cache = prefill(built, inputs, encode(built, inputs))
        decode(built, ids, cache)
    assert session.report.original_tokens == [shape.visual_tokens] * 2
    assert session.report.text_tokens == (6, 6)
    assert session.report.depth == 2


def test_weights_are_finite_repeatable_and_different_in_every_row(model):
    again = build_model(TINY["tiny"], None, "float32", "sdpa", "cpu")
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
        assert bool(one.isfinite().all()), name
        if one.ndim == 2 and len(one) > 1:
            assert len(one.unique(dim=0)) == len(one), name
    assert torch.equal(model.model.language_model.norm.weight, torch.ones(32))


def test_a_matrix_larger_than_what_is_drawn_is_filled_to_its_end(monkeypatch):
    from vtprune.eval.bench import shapes

    monkeypatch.setattr(shapes, "_BLOCK", 7 * 32 + 5)
    filled = build_model(TINY["tiny"], 1, "float32", "sdpa", "cpu").lm_head.weight
    assert len(filled.unique(dim=0)) == len(filled) and 0.01 < filled.std() < 0.03


def test_buffers_are_those_of_the_model():
    from transformers import AutoConfig, AutoModelForImageTextToText

    fields = dict(TINY["tiny"].config)
    usual = AutoModelForImageTextToText.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    built = build_model(TINY["tiny"], None, "float32", "sdpa", "cpu")
    buffers = dict(usual.named_buffers())
    assert buffers and all(torch.equal(buffers[name], buffer) for name, buffer in built.named_buffers())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_built_in_the_dtype_and_depth_asked_for(dtype):
    built = build_model(TINY["tiny"], 3, dtype, "eager", "cpu")
    assert {p.dtype for p in built.parameters()} == {getattr(torch, dtype)}
    assert len(built.get_decoder().layers) == 3 == built.config.text_config.num_hidden_layers
    assert built.config.text_config._attn_implementation == "eager"


# -- linear layers ----------------------------------------------------------------------------------------------------

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@needs_onednn
@pytest.mark.parametrize("name", BILLIONS)
@torch.inference_mode()
def test_a_model_computes_the_same_with_onednn(name):
    built = build_model(thin(SHAPES[name]), 2, "float32", "sdpa", "cpu")
    inputs = random_inputs(SHAPES[name], built, batch=2, text_tokens=6)

    def logits():
        with vtprune.prune(built, "uniform", keep_ratio=0.5):
            return built(**inputs, logits_to_keep=1).logits

    before, head = logits(), built.lm_head
    use_onednn(built)
    assert not [key for key, module in built.base_model.named_modules() if type(module) is torch.nn.Linear]
    assert built.lm_head is head and type(head) is torch.nn.Linear
    torch.testing.assert_close(logits(), before, atol=1e-4, rtol=1e-4)


@needs_onednn
def test_onednn_is_for_float32_on_a_cpu():
    assert config().computes_linear == config(linear="onednn").computes_linear == "onednn"
    assert config(linear="torch").computes_linear == "torch"
    assert config(dtype="bfloat16").computes_linear == config(device="cuda").computes_linear == "torch"
    assert config().resolved()["linear"] == "onednn"
    with pytest.raises(ConfigError, match="float32 on a CPU"):
        config(linear="onednn", dtype="bfloat16")


@pytest.mark.parametrize("linear", ["onednn", "torch"])
@needs_onednn
def test_a_run_replaces_linear_layers_only_where_it_is_asked_to(monkeypatch, linear):
    computed = []
    monkeypatch.setattr(run, "use_onednn", lambda model: computed.append("onednn") or use_onednn(model))
    lines = run.run(config(methods=["uniform", "transprune"], repeats=1, output_tokens=[1], linear=linear))
    assert [line["status"] for line in lines] == ["ok", "ok", "under its floor", "ok"]
    assert computed == ["onednn"] * (linear == "onednn") and lines[0]["config"]["linear"] == linear
    built = build_model(TINY["tiny"], None, "float32", "sdpa", "cpu")
    assert lines[0]["weight_bytes"] == sum(parameter.nbytes for parameter in built.parameters())


# -- seconds and bytes ------------------------------------------------------------------------------------------------


def test_median_and_quartiles():
    spread = Spread((4.0, 1.0, 2.0, 100.0, 3.0))
    assert (spread.median, spread.quartiles) == (3.0, (2.0, 4.0))
    assert Spread((7.0,)).quartiles == (7.0, 7.0)


def test_a_speed_up_is_taken_round_by_round():
    # the machine was twice as slow in the second round, for both sides
    assert paired([1.0, 2.0], [3.0, 6.0]).samples == (3.0, 3.0)


def test_work_on_a_gpu_is_timed_between_events(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def elapsed_time(self, end):
            return 250.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    seconds, result = timed(lambda: log.append("work") or 5, torch.device("cuda"))
    assert (seconds, result) == (0.25, 5)
    assert log == ["wait", "record", "work", "record", "wait"]


def test_peak_is_what_is_there_at_once():
    other = torch.zeros(1 << 20)

    def work():
        first = torch.zeros(1 << 20)
        second = first + other
        del first
        return torch.zeros(1 << 18) + second[: 1 << 18]

    assert peak_bytes(work) == 8 << 20


def test_an_answer_takes_the_first_token_and_the_steps_between():
    measured = Pass(1.0, 0.5, 2.0, {1: (0.1, 0.1), 4: (0.4, 0.4), 5: (1.0, 3.0, 2.0)})
    assert measured.first_token == measured.answer(1) == 3.0
    assert measured.answer(4) == pytest.approx(3.0 + 0.1 + 0.2 + 0.3)
    assert measured.answer(7) == pytest.approx(3.6 + 0.4 + 2.0 + 2.0)


# -- a pass -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def grown(model, tokens, *arguments, **options):
    """Cache after a prefill of three prompts that is grown, its lengths before, and the token that comes next."""
    inputs = random_inputs(TINY["tiny"], model, 3, 10)
    with vtprune.prune(model, *arguments, **options):
        ids, cache = prefill(model, inputs, encode(model, inputs))
        before = [layer.get_seq_length() for layer in cache.layers], [layer.keys.shape[2] for layer in cache.layers]
        grow(model, ids, cache, tokens)
        after = [layer.get_seq_length() for layer in cache.layers], [layer.keys.shape[2] for layer in cache.layers]
        logits = model(input_ids=ids, **{CACHE: cache}, use_cache=True).logits
    return cache, before, after, logits


GROWN = [
    ("uniform", {"keep_ratio": 0.25}),
    ("fastv", {"keep_ratio": 0.25}),
    ("transprune", {}),
    ("ltp", {}),
    ("lazyllm", {"keep_ratio": 0.5}),
    ("mustdrop", {}),
]


@pytest.mark.parametrize(("method", "options"), GROWN, ids=[name for name, _ in GROWN])
def test_a_cache_grows_in_every_layer_and_decoding_goes_on(model, method, options):
    _, before, after, logits = grown(model, 5, method, strict=False, **options)
    assert after[0] == [length + 5 for length in before[0]]
    assert after[1] == [length + 5 for length in before[1]] or method == "lazyllm"
    assert bool(logits.isfinite().all())


@torch.inference_mode()
def test_what_a_cache_was_grown_by_is_attended_to(model):
    """A step on a grown pruned cache equals one on a plain cache of the same keys and values, at the same position."""
    from transformers import DynamicCache

    inputs = random_inputs(TINY["tiny"], model, 2, 10)
    with vtprune.prune(model, "uniform", keep_ratio=0.25, positions="original"):
        ids, cache = prefill(model, inputs, encode(model, inputs))
        grow(model, ids, cache, 7)
        plain = DynamicCache()
        for index, layer in enumerate(cache.layers):
            plain.update(layer.keys.clone(), layer.values.clone(), index)
        ours = model(input_ids=ids, **{CACHE: cache}, use_cache=True).logits
    assert torch.equal(plain.layers[0].keys[:, :, -1], plain.layers[0].keys[:, :, -8])
    position = torch.full((2, 1), inputs["input_ids"].shape[1] + 7)
    theirs = model(input_ids=ids, **{CACHE: plain}, position_ids=position, use_cache=True).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_pass_times_steps_at_the_lengths_asked_for_and_leaves_no_trace(model, monkeypatch):
    lengths = []
    monkeypatch.setattr(
        passes, "decode", lambda m, ids, cache: lengths.append(cache.get_seq_length()) or path.decode(m, ids, cache)
    )
    inputs = random_inputs(TINY["tiny"], model, 1, 10)
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    row = Row("mmtok", {"name": "mmtok"}, 0.25)
    measured = one_pass(model, inputs, row, config(output_tokens=[2, 3, 20], steps=2))
    # 46 tokens of the prompt; when the n-th token has been generated, n - 1 of them are in the cache
    assert lengths == [47, 48, 49, 50, 65, 66]
    assert {n: len(steps) for n, steps in measured.steps.items()} == {2: 2, 3: 2, 20: 2}
    assert 0 < measured.selector < measured.prefill and measured.encoder > 0
    assert hooks == {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}


@torch.inference_mode()
@pytest.mark.parametrize("method", [None, "divprune", "fastv"])
def test_a_static_cache_answers_as_one_that_grows(model, method):
    inputs = random_inputs(TINY["tiny"], model, 2, 10)
    settings = config(cache="static", output_tokens=[1, 8])

    def answer(cache):
        ids, cache = prefill(model, inputs, encode(model, inputs), cache)
        taken = [ids]
        for _ in range(6):
            taken.append(decode(model, taken[-1], cache))
        return torch.cat(taken, 1), cache

    row = Row("row", None if method is None else {"name": method}, 0.5)
    with row.session(model):
        growing, _ = answer(None)
    with row.session(model):
        fixed, cache = answer(passes.empty_cache(model, inputs, settings))
    assert torch.equal(growing, fixed)
    # the prompt, the longest answer and what is timed there
    columns = 46 + 8 + passes.WARM_UP + 2 * settings.steps
    dropped = [0] * 8 if method is None else [18] * 8 if method == "divprune" else [0, *[21] * 7]
    assert [layer.keys.shape[2] for layer in cache.layers] == [columns - gone for gone in dropped]
    before = [layer.keys for layer in cache.layers]
    grow(model, fixed[:, -1:], cache, 7)
    assert all(layer.keys is keys for layer, keys in zip(cache.layers, before, strict=True))


def test_compiled_steps_are_timed_behind_those_that_are_compiled(model, monkeypatch):
    """With a compiler that compiles nothing: which steps are timed. That steps can be compiled, the conformance tests
    say."""
    log = []

    def counted_timed(work, device):
        log.append("timed")
        return timed(work, device)

    def step(model, ids, cache):
        log.append("step")
        return path.decode(model, ids, cache)

    monkeypatch.setattr(passes, "timed", counted_timed)
    monkeypatch.setattr(passes, "compiled_decode", lambda model, device: step)
    monkeypatch.setattr(passes, "graphs_compiled", lambda: 3)
    inputs = random_inputs(TINY["tiny"], model, 1, 10)
    settings = config(cache="static", compile=True, output_tokens=[1, 4])
    measured = one_pass(model, inputs, Row("uniform", {"name": "uniform"}, 0.5), settings)
    assert log == ["timed", "timed", *["step"] * passes.WARM_UP, *["timed", "step"] * 2] and measured.graphs == 3
    assert settings.computes_linear == "torch"


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, "divprune"])
@torch.inference_mode()
def test_compiled_steps_answer_as_others(model, method):
    inputs = random_inputs(TINY["tiny"], model, 1, 10)
    settings = config(cache="static", compile=True, output_tokens=[1, 8])
    with Row("row", None if method is None else {"name": method}, 0.5).session(model):
        answers = []
        for step in (path.compiled_decode(model, torch.device("cpu")), decode):
            ids, cache = prefill(model, inputs, encode(model, inputs), passes.empty_cache(model, inputs, settings))
            taken = [ids]
            for _ in range(6):
                taken.append(step(model, taken[-1], cache))
            answers.append(torch.cat(taken, 1))
        assert path.graphs_compiled() >= 1
    assert torch.equal(*answers)


@pytest.mark.parametrize("waits", [False, True])
def test_choices_are_timed_in_a_pass_of_their_own_where_the_clock_waits(model, monkeypatch, waits):
    profiles = []
    opened = Row.session

    def session(row, model, *, profile=True):
        profiles.append(profile)
        return opened(row, model, profile=profile)

    monkeypatch.setattr(Row, "session", session)
    monkeypatch.setattr(passes, "_clock_waits", lambda device: waits)
    inputs = random_inputs(TINY["tiny"], model, 1, 10)
    measured = one_pass(model, inputs, Row("mmtok", {"name": "mmtok"}, 0.25), config(output_tokens=[1]))
    assert profiles == ([True, False] if waits else [True]) and measured.selector > 0
    assert one_pass(model, inputs, Row("full"), config(output_tokens=[1])).selector == 0


# -- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        for name, shape in TINY.items():
            patch.setitem(SHAPES, name, shape)
        settings = config(keep_ratios=[0.11, 0.5], batch_sizes=[1, 2], output=str(folder))
        return run.run(settings), folder


def test_every_method_has_a_row_at_every_budget_and_batch_size(measured):
    lines, _ = measured
    rows = [(line["label"], line["keep_ratio"], line["status"]) for line in lines if line["batch_size"] == 2]
    for method in ("uniform", "vtc_cls", "divprune", "mmtok"):
        assert (method, 0.11, "ok") in rows and (method, 0.5, "ok") in rows
    for method in ("fastv", "transprune"):
        assert (method, 0.11, "under its floor") in rows and (method, 0.5, "ok") in rows
        assert (method, None, "ok") in rows
    assert len(rows) == 1 + 4 * 2 + 2 * 3 == len(lines) / 2
    assert rows[0] == ("full", 1.0, "ok")


def line_of(lines, label, keep_ratio, batch=1):
    (line,) = (x for x in lines if (x["label"], x["keep_ratio"], x["batch_size"]) == (label, keep_ratio, batch))
    return line


@pytest.mark.parametrize("batch", [1, 2])
def test_what_a_row_holds_is_counted(measured, model, batch):
    lines, _ = measured
    full, uniform = line_of(lines, "full", 1.0, batch), line_of(lines, "uniform", 0.11, batch)
    text = model.config.text_config
    head = 2 * 32 * 64 * batch
    for line, visual in ((full, 36), (uniform, 4)):
        assert (line["visual_tokens"], line["final_tokens"]) == (36, visual)
        assert line["measured_keep_ratio"] == pytest.approx(visual / 36)
        assert line["prefill_flops"] == batch * cost.llm_prefill_flops(text, [visual] * 8, 10) + head
        assert line["kv_bytes"] == batch * cost.kv_bytes(text, [visual + 10] * 8, dtype_bytes=4)
    encoder = batch * cost.encoder_flops(model.config.vision_config, [36], has_cls=True, gated_mlp=False)
    for line in (full, uniform):
        assert (line["encoder_flops"], line["selection_flops"]) == (encoder, 0)
        assert line["first_token_flops"] == encoder + line["prefill_flops"]
    assert uniform["ideal_first_token_speedup"] == full["first_token_flops"] / uniform["first_token_flops"]
    assert 1 < uniform["ideal_first_token_speedup"] < uniform["ideal_prefill_speedup"]
    divprune = line_of(lines, "divprune", 0.11, batch)
    assert divprune["first_token_flops"] - encoder - divprune["prefill_flops"] == divprune["selection_flops"] > 0
    assert uniform["ideal_prefill_speedup"] == full["prefill_flops"] / uniform["prefill_flops"] > 3
    assert uniform["peak_bytes"] < full["peak_bytes"]
    assert full["ideal_prefill_speedup"] == full["realised"] == full["of_plain"] == 1.0


@dataclass(frozen=True, kw_only=True)
class Costly(vtprune.LazyLLM):
    """Chooses anew for every generated token, and multiplies matrices each time."""

    name = "costly"

    def select(self, tokens):
        torch.ones(2, 3) @ torch.ones(3, 2)
        return super().select(tokens)


def test_choices_while_decoding_are_not_those_of_the_first_token(model):
    inputs = random_inputs(TINY["tiny"], model, 1, 10)
    row = Row("costly", Costly(keep_ratio=0.5), 0.5)
    with row.session(model, profile="flops") as session, torch.inference_mode():
        prefill(model, inputs, encode(model, inputs))
    assert passes.hold(model, inputs, row, config()).selection_flops == session.report.selection_flops > 0


def test_every_measurement_is_kept(measured):
    lines, _ = measured
    for line in (line for line in lines if line["status"] == "ok"):
        seconds = line["seconds"]
        assert len(seconds["encoder"]["samples"]) == len(seconds["prefill"]["samples"]) == 2
        assert set(seconds["per_token"]) == set(seconds["answer"]) == {"1", "4"}
        assert seconds["first_token"]["samples"] == [
            a + b for a, b in zip(seconds["encoder"]["samples"], seconds["prefill"]["samples"], strict=True)
        ]
        for gain in ("prefill", "first_token"):
            share = line["realised" if gain == "prefill" else "realised_first_token"]
            assert share == line["speedup"][gain]["median"] / line[f"ideal_{gain}_speedup"]
    assert line_of(lines, "full", 1.0)["seconds"]["selector"]["median"] == 0


def test_files_hold_what_was_returned_and_what_it_was_measured_with(measured):
    lines, folder = measured
    assert [json.loads(line) for line in (folder / "bench.jsonl").read_text().splitlines()] == lines
    assert {"torch", "transformers", "vtprune"} <= set(lines[0]["versions"])
    assert lines[0]["config"]["repeats"] == 2 and "output" not in lines[0]["config"]
    page = (folder / "bench.md").read_text()
    assert page.count("| full | all |") == 2 * 4 + 1  # four tables a batch size, and both sizes side by side
    assert "| fastv | 11 % | under its floor (12.5%) |" in page and "| transprune | published |" in page
    widths = {line.count("|") for line in page.splitlines() if line.startswith("| ")}
    assert len(widths) == 3  # all rows of a kind of table are as long as its head


def spread(*samples):
    return Spread(samples).to_dict()


def test_the_tables_show_parts_gains_and_shares():
    """Numbers by hand: the parts add up to the first token, and the gains of both batch sizes stand side by side."""

    def line(label, size, factor):
        seconds = {"encoder": 1.0, "selector": 0.5 * (label != "full"), "prefill": 4.0 * factor}
        seconds["first_token"] = seconds["encoder"] + seconds["prefill"]
        return {
            "label": label,
            "method": None if label == "full" else {"name": label},
            "keep_ratio": 0.5,
            "status": "ok",
            "floor": None,
            "batch_size": size,
            "prompt_tokens": 46,
            "visual_tokens": 36.0,
            "decoder_layers": 8,
            "config": {"shape": "tiny", "model": None, "dtype": "float32", "cache": "dynamic", "compile": False},
            "final_tokens": 18.0,
            "measured_keep_ratio": 0.5,
            "ideal_prefill_speedup": 2.0,
            "realised": 0.9,
            "realised_first_token": None,
            "plain_prefill_speedup": spread(1.9),
            "of_plain": 0.95,
            "of_plain_first_token": 0.97,
            "seconds": {name: spread(value) for name, value in seconds.items()}
            | {"per_token": {"1": spread(0.02), "4": spread(0.04)}, "answer": {"1": spread(3.0), "4": spread(5.0)}},
            "speedup": {
                "prefill": spread(1 / factor),
                "first_token": spread(size / factor),
                "answer": {"1": spread(1.0), "4": spread(1.25 * size)},
            },
            "peak_bytes": 2e7,
            "kv_bytes": 3e6,
        }

    first, answers, prefills, held, *_, gains = table.sheets([line("uniform", size, 0.5) for size in (1, 8)])
    shown = [dict(zip(sheet.head, sheet.body[0], strict=True)) for sheet in (first, prefills, held, gains)]
    assert shown[0] == {
        "method": "uniform",
        "budget": "50 %",
        "encoder": "1.00 s",
        "selection": "500 ms",
        "LLM": "1.50 s",
        "first token": "3.00 ±0.00 s",
        "gain": "2.00x",
        "of ideal": "–",
        "of plain": "97 %",
    }
    assert answers.body[0][2:] == ["50.0", "5.00 s", "1.25x", "25.0"]
    assert [shown[1][key] for key in ("gain", "ideal", "of ideal", "plain", "of plain")] == [
        "2.00x",
        "2.00x",
        "90 %",
        "1.90x",
        "95 %",
    ]
    assert shown[2] | {"method": "", "budget": ""} == {
        "method": "",
        "budget": "",
        "last layer": "18",
        "average": "50.0 %",
        "peak": "20 MB",
        "KV": "3 MB",
    }
    assert [shown[3][f"{what} batch {size}"] for what in ("first token", "4 tokens") for size in (1, 8)] == [
        "2.00x",
        "16.00x",
        "1.25x",
        "10.00x",
    ]
    assert len(gains.body) == 1


def test_a_file_of_an_earlier_version_is_refused_by_name(measured, tmp_path):
    lines, _ = measured
    earlier = [{key: value for key, value in line.items() if "first_token" not in key} for line in lines]
    (tmp_path / "bench.jsonl").write_bytes(b"".join(map(to_line, earlier)))
    with pytest.raises(ConfigError, match=r"bench\.jsonl: not of this version of vtprune; run `vtprune bench` again"):
        write_report([tmp_path], tmp_path / "report.html")
    (tmp_path / "bench.jsonl").write_bytes(b"".join(map(to_line, lines)))
    write_report([tmp_path], tmp_path / "report.html")
    assert "Gains by batch size" in (tmp_path / "report.html").read_text()


def test_rows_take_turns_in_an_order_that_changes(monkeypatch):
    turns = []

    def fake_pass(model, inputs, row, settings):
        turns.append(row.label)
        return Pass(1.0, 0.0, 1.0, {1: (1.0,)})

    monkeypatch.setattr(rounds, "one_pass", fake_pass)
    run.run(config(methods=["uniform", "divprune", "mmtok"], repeats=6, output_tokens=[1]))
    orders = [tuple(turns[i : i + 4]) for i in range(0, len(turns), 4)]
    assert len(orders) == 6 and all(set(r) == {"full", "uniform", "divprune", "mmtok"} for r in orders)
    assert len(set(orders)) > 2 and len({r[0] for r in orders}) > 1


def test_realised_is_measured_over_ideal(monkeypatch):
    drift = iter([1.0, 1.0, 5.0, 5.0, 1.0, 1.0])

    def fake_pass(model, inputs, row, settings):
        slow = next(drift)
        prefill_seconds = 4.0 if row.label == "full" else 2.0
        return Pass(1.0 * slow, 0.0, prefill_seconds * slow, {1: (0.5 * slow,), 4: (0.5 * slow,)})

    monkeypatch.setattr(rounds, "one_pass", fake_pass)
    monkeypatch.setattr(rounds, "plain_pass", lambda model, batch, length: 1.0)
    full, uniform = run.run(config(methods=["uniform"], repeats=3))
    assert uniform["speedup"]["prefill"]["samples"] == [2.0, 2.0, 2.0]
    assert uniform["realised"] == 2.0 / uniform["ideal_prefill_speedup"]
    assert uniform["speedup"]["first_token"]["median"] == pytest.approx(5 / 3)
    assert uniform["speedup"]["answer"]["4"]["median"] == pytest.approx(6.5 / 4.5)
    assert full["speedup"]["prefill"]["median"] == 1.0


def test_plain_is_the_models_own_time_at_the_lengths_of_each_layer(model):
    plain = {10: [1.0, 2.0], 30: [3.0, 4.0], 50: [5.0, 10.0]}
    timed_passes = [Pass(2.0, 0.0, 4.0, {1: (1.0,)}), Pass(3.0, 0.0, 5.0, {1: (1.0,)})]
    full = [Pass(1.0, 0.0, 5.0, {1: (1.0,)}), Pass(1.5, 0.0, 10.0, {1: (1.0,)})]
    beside = bench_lines.beside_plain(plain, [50, 20, 10, 10], timed_passes, full)
    # (5 + 2 + 1 + 1) / 4 and (10 + 3 + 2 + 2) / 4 seconds, the text of 20 tokens interpolated
    assert beside["plain_prefill_speedup"]["samples"] == pytest.approx([5 / 2.25, 10 / 4.25])
    assert beside["of_plain"] == pytest.approx((2.25 / 4 + 4.25 / 5) / 2)
    # with the encoder of the full model
    assert beside["plain_first_token_speedup"]["samples"] == pytest.approx([6 / 3.25, 11.5 / 5.75])
    assert beside["of_plain_first_token"] == pytest.approx((3.25 / 6 + 5.75 / 8) / 2)


def test_text_as_long_as_what_is_left_is_measured_in_every_round(monkeypatch):
    measured = []
    monkeypatch.setattr(rounds, "plain_pass", lambda model, batch, length: measured.append((batch, length)) or 1.0)
    lines = run.run(config(methods=["uniform", "divprune", "fastv"], batch_sizes=[2], keep_ratios=[0.25], repeats=3))
    fastv = round((0.25 * 8 - 1) / 7 * 36)  # everything in the first layer, the rest of the budget behind it
    assert lines[-1]["final_tokens"] == fastv
    # 10 text tokens; once to warm up, then in every round
    assert sorted(measured) == sorted([(2, 10 + 9), (2, 10 + fastv)] * 4)


def test_methods_that_a_model_cannot_serve_are_shown_as_such():
    lines = run.run(config(shape="tiny-siglip", methods=["vtc_cls", "uniform"], repeats=1))
    assert [line["status"] for line in lines] == ["ok", "unsupported", "ok"]
    assert "CLS token" in lines[1]["reason"] and "seconds" not in lines[1]


def test_a_model_from_a_folder_is_shown_an_image_by_its_processor(tmp_path):
    folder = tiny_eval.save_model(tmp_path)
    settings = load_config(
        model=str(folder), image_size=(60, 80), methods=["uniform"], keep_ratios=[0.5], batch_sizes=[2], repeats=1
    )
    full, uniform = run.run(settings)
    assert (full["visual_tokens"], uniform["final_tokens"], full["decoder_layers"]) == (16, 8, 8)


# -- configuration and command ----------------------------------------------------------------------------------------


def test_the_file_in_the_package_is_valid():
    loaded = load_config(Path(vtprune.eval.__file__).parent / "configs" / "bench.yaml")
    assert (loaded.device, loaded.batches) == ("cuda", (1, 8))


def test_defaults_depend_on_the_device():
    assert (load_config(shape="tiny").batches, load_config(shape="tiny").rounds) == ((1,), 3)
    on_gpu = load_config(shape="tiny", device="cuda:0")
    assert (on_gpu.batches, on_gpu.rounds) == ((1, 8), 10)
    with pytest.raises(ConfigError, match="'cuda:0' is not available"):
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        run.run(on_gpu)


def test_a_file_gives_methods_parameters_and_budgets_and_options_replace_its_fields(tmp_path):
    file = tmp_path / "seven.yaml"
    file.write_text(
        "shape: llava-1.5-7b\nlayers: 4\nmethods:\n- mmtok\n- {name: fastv, layer: 1, keep_ratios: [0.4]}\n"
        "keep_ratios: [0.2]\nbatch_sizes: [1, 8]\n"
    )
    loaded = load_config(file, layers=2, keep_ratios=None)
    assert (loaded.layers, loaded.keep_ratios, loaded.batches) == (2, (0.2,), (1, 8))
    assert loaded.output == Path("results/seven")
    mmtok, fastv = loaded.methods
    assert (mmtok.label, mmtok.keep_ratios) == ("mmtok", None)
    assert (fastv.label, fastv.keep_ratios, fastv.params) == ("fastv(layer=1)", (0.4,), {"layer": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "llava-1.5-8b"}, "--shape: unknown shape 'llava-1.5-8b'; did you mean llava-1.5-7b"),
        ({}, "give 'shape' or 'model', one of the two"),
        ({"shape": "tiny", "model": "digitscenes"}, "give 'shape' or 'model', one of the two"),
        ({"model": "digitscenes", "layers": 4}, "'layers' is for a 'shape'"),
        ({"shape": "tiny", "methods": ["mmtk"]}, "--methods: unknown method 'mmtk': did you mean mmtok"),
        ({"shape": "tiny", "methods": [{"name": "fastv", "layr": 1}]}, "unknown parameter 'layr'"),
        ({"shape": "tiny", "methods": [{"name": "fastv", "keep_tokens": 1}]}, "is 'keep_ratios', not 'keep_tokens'"),
        ({"shape": "tiny", "keep_ratios": [1.5]}, "--keep-ratios: expected less than 1, got 1.5"),
        ({"shape": "tiny", "dtype": "int8"}, "--dtype: expected 'float32', 'bfloat16' or 'float16', got 'int8'"),
        ({"shape": "tiny", "device": "tpu"}, "--device: "),
        ({"shape": "tiny", "batch_sizes": ["x"]}, "--batch-sizes: "),
        ({"shape": "tiny", "compile": True}, "'compile' needs cache 'static'"),
        ({"shape": "tiny", "cache": "static", "compile": True, "linear": "onednn"}, "'compile' needs linear 'torch'"),
    ],
)
def test_a_mistake_is_named(options, message):
    with pytest.raises(ConfigError) as error:
        load_config(**options)
    assert message in str(error.value)


def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path):
    file = tmp_path / "bench.yaml"
    file.write_text("shape: tiny\nkeep_ratios: [0.2]\nrepeat: 3\n")
    with pytest.raises(ConfigError, match=r"bench\.yaml, line 3: key 'repeat': unknown key; did you mean repeats"):
        load_config(file)


def test_the_command_prints_tables_of_80_columns(tmp_path):
    arguments = ["bench", "--shape", "tiny", "--methods", "uniform,fastv", "--keep-ratio", "0.11", "--repeats", "1"]
    arguments += ["--output-tokens", "1,3", "--batch-sizes", "2", "--output", str(tmp_path)]
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, arguments)
    assert result.exit_code == 0, result.output
    titles = (
        "Time to the first token. tiny, 8 decoder layers",
        "Whole answers, computed",
        "Prefill of the",
        "Visual t",
    )
    assert all(text in result.stdout for text in titles)
    assert "under its" in result.stdout and "(12.5%)" in result.stdout and "published" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert len((tmp_path / "bench.jsonl").read_text().splitlines()) == 4


def test_the_command_refuses_in_one_line():
    result = CliRunner().invoke(app, ["bench", "--shape", "llava"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --shape: unknown shape 'llava'") and result.stderr.count("\n") == 1


def test_the_schema_is_that_of_a_file():
    assert {"shape", "methods", "keep_ratios"} <= set(BenchConfig.model_json_schema()["properties"])
