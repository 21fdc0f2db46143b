# SPDX-License-Identifier: Apache-2.0
"""Evaluation on videos: files are decoded and sampled as the processor does it, and every kind of cell has its row."""

from pathlib import Path

import numpy as np
import pytest
import tiny_eval
import tiny_video
import torch
import yaml
from tiny_video import FRAMES, TOKENS
from transformers import BatchFeature

import vtprune
import vtprune.eval
from vtprune.errors import BudgetError, ConfigError, UnsupportedStageError
from vtprune.eval import digitscenes
from vtprune.eval.config import load_config
from vtprune.eval.digitscenes import mp4
from vtprune.eval.digitscenes.video_model import build_video_model, build_video_processor
from vtprune.eval.inputs import InputCache, conversation_inputs, load_model
from vtprune.eval.inputs.downsample import FewerFrames
from vtprune.eval.results.records import cell_records
from vtprune.eval.running import questions, runner
from vtprune.eval.running.cells import expand

WHOLE = {"scope": "image"}
METHODS = [
    {"name": "random", "seeds": [0, 1], **WHOLE},
    {"name": "divprune", **WHOLE},
    {"name": "pool", "frames": 2, **WHOLE},
    "uniform_frames",
    "holitom",
    "vtc_cls",
]
CONFIG = {"task": "tiny_video", "batch_size": 4, "keep_ratios": [0.5, 0.1], "methods": METHODS}
CONTENT = TOKENS - 1  # the newline token is none


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_video.save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def loaded(model):
    return load_model(model)


@pytest.fixture(scope="module")
def config_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump({"model": model, **CONFIG}))
    return path


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    """An uninterrupted run: its folder, its lines, and how often inputs were made."""
    output, made = tmp_path_factory.mktemp("finished"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "conversation_inputs", lambda *args: made.append(args) or conversation_inputs(*args))
        return output, runner.run(load_config(config_file, output=output)), len(made)


def cell(results, method, ratio, seed=None):
    (found,) = (r for r in results if (r["method"], r["keep_ratio"], r["seed"]) == (method, ratio, seed))
    return found


def inputs(processor, examples):
    return conversation_inputs(processor, [example.conversation() for example in examples])


def pixels(processor, inputs) -> torch.Tensor:
    """What the encoder gets, as grey levels: (batch, frames, channels, height, width)."""
    mean, std = (torch.tensor(getattr(processor.video_processor, f"image_{name}")) for name in ("mean", "std"))
    return 255 * (inputs["pixel_values_videos"] * std[:, None, None] + mean[:, None, None])


def test_the_frames_of_a_file_are_the_processors_choice(loaded):
    _, processor = loaded
    examples = tiny_video.examples(3)
    batch = inputs(processor, examples)
    assert (batch["input_ids"] == processor.video_token_id).sum(1).tolist() == [TOKENS] * 3
    assert (batch["attention_mask"][:, -1] == 1).all() and (batch["attention_mask"][:, 0] == 0).any()  # left padding
    for index, shown in enumerate(pixels(processor, batch)):
        drawn = tiny_video.clip(index)
        sampled = torch.from_numpy(drawn[np.arange(FRAMES) * len(drawn) // FRAMES]).permute(0, 3, 1, 2)
        assert (shown - sampled).abs().max() < 4
    assert "fetch_videos" not in vars(processor.video_processor)


def test_fewer_frames(loaded):
    _, processor = loaded
    third = FewerFrames(processor, 0.3)
    (example,) = tiny_video.examples(1)
    batch = third.inputs([example.conversation()])
    shown = pixels(processor, batch)[0]
    drawn = torch.from_numpy(tiny_video.clip(0)[[0, 3]]).permute(0, 3, 1, 2)  # of 7 frames
    assert shown.shape == (2, 3, tiny_video.SIZE, tiny_video.SIZE) and (shown - drawn).abs().max() < 4
    assert (batch["input_ids"] == processor.video_token_id).sum() == 2 * 16 + 1
    with pytest.raises(BudgetError, match=r"of 6 it cannot keep less than 16\.7%; 10\.0% was asked for") as caught:
        FewerFrames(processor, 0.1)
    assert caught.value.floor == 1 / FRAMES


def test_fewer_frames_of_a_processor_that_takes_all(model):
    _, processor = load_model(model)
    processor.video_processor.do_sample_frames = False
    with pytest.raises(UnsupportedStageError, match="a fixed number of frames"):
        FewerFrames(processor, 0.5)


def test_numbers_of_the_cells(finished):
    _, results, _ = finished
    full = cell(results, "full", 1.0)
    assert (full["n"], full["final_tokens"], full["measured_keep_ratio"]) == (tiny_eval.EXAMPLES, TOKENS, 1.0)
    for method, seed in (("random", 0), ("random", 1), ("divprune", None), ("uniform_frames", None)):
        assert cell(results, method, 0.1, seed)["final_tokens"] == pytest.approx(round(0.1 * CONTENT), abs=1)
    assert cell(results, "pool", 0.5)["final_tokens"] == pytest.approx(CONTENT / 2, abs=1)  # all that two frames leave
    assert cell(results, "holitom", 0.1)["measured_keep_ratio"] == pytest.approx(0.1, abs=0.02)
    assert cell(results, "zero", 0.0)["final_tokens"] == 0
    assert cell(results, "divprune", 0.1)["prefill_flops"] < 0.5 * full["prefill_flops"]


def test_cells_that_cannot_run_say_so(finished):
    output, results, _ = finished
    half, tenth = cell(results, "downsample", 0.5), cell(results, "downsample", 0.1)
    assert (half["status"], half["final_tokens"]) == ("ok", 3 * 16 + 1)
    assert (tenth["status"], tenth["floor"], tenth["score"]) == ("under its floor", 1 / FRAMES, None)
    without_cls = cell(results, "vtc_cls", 0.5)
    assert (without_cls["status"], without_cls["score"]) == ("unsupported", None) and "CLS" in without_cls["reason"]
    lines = (output / "summary.md").read_text().splitlines()
    assert next(line for line in lines if line.startswith("| downsample")).endswith("*under its floor (16.7%)* |")
    assert "| vtc_cls | *unsupported* | *unsupported* |" in lines
    assert "| pool(frames=2,scope=image)" in "\n".join(lines).replace(", ", ",")
    for plot in ("pareto.png", "families.png"):
        assert (output / plot).read_bytes().startswith(b"\x89PNG")


def test_a_file_is_decoded_once_for_all_cells(finished):
    _, results, made = finished
    assert sum(r["status"] == "ok" for r in results) == 2 + 1 + 4 + 4 * 2
    assert made == len(range(0, tiny_eval.EXAMPLES, CONFIG["batch_size"]))  # `downsample` has inputs of its own


def test_a_batch_answers_what_each_question_alone_does(finished, config_file, tmp_path):
    _, results, _ = finished
    alone = runner.run(load_config(config_file, output=tmp_path, batch_size=1))
    for one, other in zip(results, alone, strict=True):
        assert one["score"] == other["score"] and one["final_tokens"] == other["final_tokens"]


def test_the_grid_for_video():
    config = load_config(Path(vtprune.eval.__file__).parent / "configs" / "video.yaml")
    cells = expand(config)
    assert len(cells) == len({str(cell) for cell in cells}) == 2 + 4 * (1 + 3 + 3 + 15)
    assert [cell.keep_ratio for cell in cells if cell.method == "holitom"] == [0.25, 0.15, 0.1, 0.05]
    for drawn in ("random", "block"):
        assert {cell.seed for cell in cells if cell.method == drawn} == {0, 1, 2}
    for_video = {"holitom", "vidcom2", "fastvid", "aim", "bvllm_merge", "progressive_pooling", "adaptive_pool"}
    baselines = {"full", "zero", "downsample", "random", "uniform", "uniform_frames", "block", "pool"}
    assert for_video | baselines <= {cell.method for cell in cells}


def test_the_task_of_clips(tmp_path, monkeypatch):
    """From drawn clips through their files to answers; with random weights, which answer something."""
    monkeypatch.setattr(mp4, "cached_assets_path", lambda **names: tmp_path)
    build_video_model().save_pretrained(tmp_path / "model")
    build_video_processor().save_pretrained(tmp_path / "model")
    config = {"model": str(tmp_path / "model"), "task": "digitscenes_video", "keep_ratios": [0.25], "limit": 5}
    (tmp_path / "clips.yaml").write_text(yaml.safe_dump({**config, "methods": ["uniform"]}))
    results = runner.run(load_config(tmp_path / "clips.yaml", output=tmp_path / "output"))
    assert [(r["method"], r["final_tokens"]) for r in results] == [
        ("full", 12 * 16 + 1),
        ("zero", 0),
        ("downsample", 3 * 16 + 1),
        ("uniform", 12 * 4 + 1),
    ]
    examples = digitscenes.video_examples("test", limit=5)
    assert set(tmp_path.glob("*.mp4")) == {example.video_path(tmp_path) for example in examples}
    records = cell_records(tmp_path / "output", results[0]["cell"])
    for example, record in zip(examples, records, strict=True):
        assert (record["question"], record["answer"]) == (example.question, example.answer)
        assert record["score"] == digitscenes.score(record["prediction"], example.answer)


def test_a_finished_run_goes_on_from_its_files(finished, config_file):
    output, results, _ = finished
    before = (output / "timings.jsonl").read_bytes()
    assert runner.run(load_config(config_file, output=output)) == results
    assert (output / "timings.jsonl").read_bytes() == before


def test_a_model_that_takes_no_videos(config_file, tmp_path):
    images_only = str(tiny_eval.save_model(tmp_path / "model"))
    with pytest.raises(ConfigError, match="task 'tiny_video' shows videos, which LLaVA-1.5 does not take"):
        runner.run(load_config(config_file, model=images_only, output=tmp_path / "output"))


def test_cached_inputs_are_made_once_while_they_fit(loaded):
    made = []

    def make(batch):
        made.append(batch)
        return BatchFeature({"pixels": torch.full((len(batch), 10), float(batch.start))})

    first, second, third = range(0, 2), range(2, 4), range(4, 5)
    cache = InputCache(make, limit=130)  # a batch of two takes 80 bytes, one example 40
    for _ in range(2):
        for batch in (first, second, third):
            inputs = cache(batch).to(torch.float16)  # as the runner does: the cache must not change with it
            assert inputs["pixels"].dtype == torch.float16 and inputs["pixels"].shape[0] == len(batch)
            assert (inputs["pixels"] == batch.start).all()
    assert made == [first, second, third, second]
    assert cache(first)["pixels"].dtype == torch.float32


def test_methods_on_video_give_the_same_tokens_cached_or_not(loaded):
    """Running a cell leaves the cached tensors as they were."""
    model, processor = loaded
    cache = InputCache(lambda batch: inputs(processor, tiny_video.examples(batch.stop)))
    counts = []
    for _ in range(2):
        with vtprune.prune(model, "holitom", keep_ratio=0.3) as session, torch.inference_mode():
            output = model.generate(**cache(range(3)), max_new_tokens=3, do_sample=False)
        counts.append((session.report.counts.tolist(), output.tolist()))
    assert counts[0] == counts[1]
