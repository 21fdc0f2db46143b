# SPDX-License-Identifier: Apache-2.0
"""Measured results are written between the markers of their page, each run in its own place."""

from pathlib import Path

import pytest
import typer

from vtprune.eval.results.records import to_line

SCRIPT = "update_results"

ROOT = Path(__file__).parents[2]
QUICKSTART, VIDEO, CLIP = (
    f"before\n<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in ("quickstart", "video", "clip")
)


def finished_run(folder: Path, score: float) -> Path:
    folder.mkdir(parents=True)
    line = {"label": "uniform", "keep_ratio": 0.25, "status": "ok", "n": 1200, "score": score, "ci": [0.1, 0.9]}
    (folder / "results.jsonl").write_bytes(to_line(line))
    for name in ("pareto.png", "families.png", "summary.md"):
        (folder / name).write_text(f"{name} of {folder.name}")
    return folder


@pytest.fixture
def page(tmp_path):
    """Of the three, the page that shows them."""
    results = tmp_path / "docs" / "results.md"
    results.parent.mkdir()
    results.write_text(QUICKSTART + VIDEO + CLIP)
    return results


def finished_clip_run(folder: Path) -> Path:
    """Two tasks with two rows each."""
    folder.mkdir(parents=True)
    costs = {"final_tokens": 72, "encoder_flops": 5e8, "unpruned_encoder_flops": 1e9, "status": "ok", "n": 50}
    lines = [
        {"label": label, "keep_ratio": ratio, "task": task, "model": "clip", "cell": f"{label}-{task}", "score": score}
        | costs
        | ({"encoder_flops": 1e9, "final_tokens": 144} if label == "full" else {})
        for task, scores in (("digits", (0.9, 0.8)), ("colours", (1.0, 0.7)))
        for label, ratio, score in zip(("full", "tome"), (1.0, 0.5), scores, strict=True)
    ]
    (folder / "results.jsonl").write_bytes(b"".join(map(to_line, lines)))
    times = [
        {"cell": line["cell"], "first": 0, "examples": 50, "seconds": 0.5 if line["label"] == "full" else 0.25}
        for line in lines
    ]
    (folder / "timings.jsonl").write_bytes(b"".join(map(to_line, times)))
    for name in ("pareto-1-digits-clip.png", "families-1-digits-clip.png", "pareto-2-colours-clip.png", "summary.md"):
        (folder / name).write_text(name)
    return folder


def test_a_run_of_several_tasks_has_a_table_of_all_of_them(script, page, tmp_path):
    (tmp_path / "docs" / "clip").mkdir()
    (tmp_path / "docs" / "clip" / "pareto-9-gone.png").write_text("of an earlier run")
    script.main(finished_clip_run(tmp_path / "results" / "clip"), tmp_path)
    text = page.read_text()
    assert text.startswith(QUICKSTART + VIDEO) and "on 50 images of each task of DigitScenes, zero-shot," in text
    assert "| full | – | 144 | 1 GFLOPs (1.00) | 100 (1.00) | 90.0 | 100.0 |" in text
    assert "| tome | 50 % | 72 | 500 MFLOPs (0.50) | 200 (2.00) | 80.0 | 70.0 |" in text
    assert "(clip/pareto-1-digits-clip.png)" in text and "(clip/summary.md)" in text
    files = {path.name for path in (tmp_path / "docs" / "clip").iterdir()}
    assert files == {path.name for path in (tmp_path / "results" / "clip").iterdir() if "jsonl" not in path.name}


def test_each_run_has_its_place(script, page, tmp_path):
    for name, score in (("quickstart", 0.5), ("video", 0.75)):
        script.main(finished_run(tmp_path / "results" / name, score), tmp_path)
        assert (tmp_path / "docs" / name / "summary.md").read_text() == f"summary.md of {name}"
        assert {path.name for path in (tmp_path / "docs" / name).iterdir()} == {
            "pareto.png",
            "families.png",
            "summary.md",
        }
    text = page.read_text()
    first, second = text.split("<!-- quickstart:end -->\n")
    assert "| uniform | 50.0 [10.0, 90.0] |" in first and "on 1,200 questions of DigitScenes," in first
    assert "| uniform | 75.0 [10.0, 90.0] |" in second and "on 1,200 questions of DigitScenes-Video," in second
    assert "(quickstart/pareto.png)" in first and "(video/pareto.png)" in second
    assert first.startswith("before\n<!-- quickstart:begin -->\n") and "old" not in first
    assert second.endswith(CLIP) and "old" not in second.removesuffix(CLIP)

    script.main(tmp_path / "results" / "video", tmp_path)  # again changes nothing
    assert page.read_text() == text


def test_a_run_without_a_place_is_refused(script, page, tmp_path):
    with pytest.raises(typer.BadParameter, match="expected a folder called quickstart or video or clip"):
        script.main(finished_run(tmp_path / "results" / "other", 0.5), tmp_path)
    page.write_text("no markers")
    with pytest.raises(typer.BadParameter, match="has no markers for video"):
        script.main(finished_run(tmp_path / "results" / "video", 0.5), tmp_path)
    assert page.read_text() == "no markers" and not (tmp_path / "docs" / "video").exists()


def test_the_page_has_the_markers(script):
    for name in script.SUBJECTS:
        page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
        assert page.count(f"<!-- {name}:begin -->") == page.count(f"<!-- {name}:end -->") == 1
