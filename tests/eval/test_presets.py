# SPDX-License-Identifier: Apache-2.0
"""Published settings against what their publications say: tokens of every layer, FLOPs, numbers of the right kind."""

import pytest
import tiny_eval
import yaml
from transformers import AutoConfig

from vtprune.cost import llm_prefill_flops
from vtprune.errors import BudgetError
from vtprune.eval.bench.shapes import SHAPES
from vtprune.eval.config import EvalConfig, load_config
from vtprune.eval.presets import presets
from vtprune.eval.running.cells import expand
from vtprune.eval.running.runner import run
from vtprune.methods import build_methods
from vtprune.plan import Prompt, plan
from vtprune.tokens import ModelShape

BY_HAND = {
    "fastv/llava-1.5-7b/192": ({0: 576, 2: 192}, 0.896),
    "mmtok/llava-1.5-7b/64": ({0: 64}, 0.966),
    "mmtok/llava-next-7b/640": ({0: 640}, 0.987),
    "mmtok/qwen2.5-vl-7b/5%": ({0: 50}, 0.79),
    "vtc_cls/llava-1.5-7b/128": ({0: 128}, 0.605),
    "transprune/llava-1.5-7b/high": ({0: 576, 7: 504, 9: 360, 12: 72}, 1.0),
    "holitom/llava-onevision-7b/10%": ({0: 640, 18: 320}, 0.991),
    "visionzip/llava-1.5-7b/64": ({0: 64}, 0.932),
    "aim/llava-1.5-7b/252": ({0: 252, 14: 220, 15: 189, 17: 126, 20: 31, 21: 0}, 0.586),
}
"""Copied from the papers by hand a second time: some of the decoder layers, and the number that is printed."""


def by_layer(kept, depth):
    counts = []
    for layer in range(depth):
        counts.append(kept.get(layer, counts[-1] if counts else None))
    return counts


def cell_of(name):
    grid = {"baselines": ["full"], "keep_ratios": [0.5], "methods": [{"preset": name}]}
    _, cell = expand(EvalConfig(model="digitscenes", output="results", **grid))
    return cell


@pytest.mark.parametrize("name", list(presets()))
def test_a_setting_keeps_on_every_layer_what_is_published(name):
    preset, cell = presets()[name], cell_of(name)
    assert (cell.label, cell.method) == (name, name.split("/")[0])
    text = SHAPES[name.split("/")[1]].config["text_config"]
    config = AutoConfig.for_model(text["model_type"], **{k: v for k, v in text.items() if k != "model_type"})
    depth = config.num_hidden_layers
    prompt = Prompt(preset.visual_tokens, preset.crops, 40)
    counts = plan(build_methods(cell.spec), ModelShape(24, depth, 22, True), prompt)
    if preset.kept is None:
        assert counts is None
        return
    # Inside the LLM the last counts are rounded so that the average over the layers is met.
    assert counts == pytest.approx(by_layer(preset.kept, depth), abs=max(1, 0.005 * preset.visual_tokens))
    assert sum(counts) == pytest.approx(sum(by_layer(preset.kept, depth)), rel=0.005)
    if preset.flops is not None:
        counted = {"text_tokens": preset.flops.text, "convention": preset.flops.convention}
        full = llm_prefill_flops(config, [preset.visual_tokens] * depth, **counted)
        assert llm_prefill_flops(config, counts, **counted) / full == pytest.approx(preset.flops.share, abs=0.002)


@pytest.mark.parametrize("name", list(BY_HAND))
def test_settings_copied_by_hand_a_second_time(name):
    kept, value = BY_HAND[name]
    preset = presets()[name]
    assert kept.items() <= preset.kept.items()
    assert preset.published.value == value


def test_every_published_number_names_its_source_and_is_a_share():
    for name, preset in presets().items():
        if preset.published is None:
            assert name.startswith("mustdrop/")
            continue
        assert preset.published.source.startswith("arXiv ") and preset.published.table
        assert 0.4 < preset.published.value < 1.01


def test_the_report_has_ours_beside_theirs(tmp_path):
    path = tmp_path / "presets.yaml"
    model = str(tiny_eval.save_model(tmp_path / "model"))
    settings = {"model": model, "task": "tiny", "limit": 4, "keep_ratios": [0.5], "baselines": ["full"]}
    path.write_text(yaml.safe_dump({**settings, "output": str(tmp_path / "output"), "methods": [{}]}))
    config = load_config(path, {"methods": [{"preset": "mmtok/llava-1.5-7b/64"}]})
    with pytest.raises(BudgetError, match="keep_tokens=64 is larger than the image"):
        run(config)
    names = "fastv/llava-1.5-7b/192", "mustdrop/llava-1.5-7b/64"
    _, plain, fastv, mustdrop = run(load_config(path, {"methods": ["uniform", *({"preset": name} for name in names)]}))
    assert "published" not in plain and mustdrop["published"] is None
    assert (fastv["label"], fastv["keep_ratio"], fastv["params"]["share"]) == (names[0], None, 0.333333)
    assert fastv["final_tokens"] == round(16 / 3)

    summary = (tmp_path / "output" / "summary.md").read_text().splitlines()
    ours = 100 * fastv["retention"]
    row = f"| {names[0]} | retention | {ours:.1f} | 89.6 | {ours - 89.6:+.1f} | mean of 9 | arXiv 2508.18264, Table 1 |"
    assert row in summary
    accuracy = next(line for line in summary if line.startswith(f"| {names[1]}"))
    assert f"| {100 * mustdrop['score']:.1f} [" in accuracy
