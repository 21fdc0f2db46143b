# SPDX-License-Identifier: Apache-2.0
"""Measured results land between the README's markers, each run's in its own place."""

from pathlib import Path

import pytest
import typer

from vtprune.eval.results.records import to_line

SCRIPT = "update_readme"

ROOT = Path(__file__).parents[2]
PAGE = """\
before
<!-- quickstart:begin -->
old
<!-- quickstart:end -->
between
<!-- video:begin -->
<!-- video:end -->
"""


def finished_run(folder: Path, score: float) -> Path:
    folder.mkdir(parents=True)
    line = {"label": "uniform", "keep_ratio": 0.25, "status": "ok", "n": 1200, "score": score, "ci": [0.1, 0.9]}
    (folder / "results.jsonl").write_bytes(to_line(line))
    for name in ("pareto.png", "families.png", "summary.md"):
        (folder / name).write_text(f"{name} of {folder.name}")
    return folder


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(PAGE)
    return path


def test_each_run_has_its_place(script, readme, tmp_path):
    for name, score in (("quickstart", 0.5), ("video", 0.75)):
        script.main(finished_run(tmp_path / "results" / name, score), readme)
        assert (tmp_path / "docs" / name / "summary.md").read_text() == f"summary.md of {name}"
        assert {path.name for path in (tmp_path / "docs" / name).iterdir()} == {
            "pareto.png",
            "families.png",
            "summary.md",
        }
    page = readme.read_text()
    first, second = page.split("between\n")
    assert "| uniform | 50.0 [10.0, 90.0] |" in first and "on 1,200 questions of DigitScenes," in first
    assert "| uniform | 75.0 [10.0, 90.0] |" in second and "on 1,200 questions of DigitScenes-Video," in second
    assert "(docs/quickstart/pareto.png)" in first and "(docs/video/pareto.png)" in second
    assert first.startswith("before\n<!-- quickstart:begin -->\n") and "old" not in page

    script.main(tmp_path / "results" / "video", readme)  # again changes nothing
    assert readme.read_text() == page


def test_a_run_without_a_place_is_refused(script, readme, tmp_path):
    with pytest.raises(typer.BadParameter, match="expected a folder called quickstart or video"):
        script.main(finished_run(tmp_path / "results" / "other", 0.5), readme)
    readme.write_text("no markers")
    with pytest.raises(typer.BadParameter, match="has no markers for video"):
        script.main(finished_run(tmp_path / "results" / "video", 0.5), readme)
    assert readme.read_text() == "no markers" and not (tmp_path / "docs").exists()


def test_the_readme_has_the_markers(script):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in script.SUBJECTS:
        assert page.count(f"<!-- {name}:begin -->") == page.count(f"<!-- {name}:end -->") == 1
