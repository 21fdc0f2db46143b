# SPDX-License-Identifier: Apache-2.0
"""Every step of the measurements for a GPU runs, on a CPU and a small model, and its results lie in the archive."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_gpu.sh"


@pytest.mark.slow
def test_one_command_leaves_one_archive(tmp_path):
    environment = os.environ | {"DEVICE": "cpu", "PYTHON": sys.executable}
    result = subprocess.run([SCRIPT, tmp_path / "out"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        archive.extractall(tmp_path / "back", filter="data")
    back = tmp_path / "back" / "out"
    ended = dict(line.split(": ", 1) for line in (back / "summary.txt").read_text().splitlines())
    assert all(how.startswith("ok, ") for how in ended.values())
    steps = ["packages", "doctor-float32", "doctor-bfloat16-sdpa", "tests", "stalls-small", "bench-small-sdpa"]
    steps.append("bench-small-static")
    assert [step for step in ended if "flash" not in step and step != "machine"] == steps
    assert "Every promise holds." in (back / "doctor-bfloat16-sdpa.txt").read_text()
    assert " passed" in (back / "tests.txt").read_text()
    assert [row["method"] for row in json.loads((back / "stalls-small.json").read_text())] == [
        "full",
        "divprune",
        "fastv",
    ]
    lines = [json.loads(line) for line in (back / "bench-small-sdpa" / "bench.jsonl").read_text().splitlines()]
    assert {line["batch_size"] for line in lines} == {1, 8} and lines[0]["config"]["dtype"] == "bfloat16"
    again = subprocess.run([SCRIPT, tmp_path / "out"], env=environment, capture_output=True, text=True)
    assert again.returncode == 2 and "is there already" in again.stderr


@pytest.mark.slow
def test_a_step_that_fails_is_named_and_the_others_go_on(tmp_path):
    environment = os.environ | {"DEVICE": "cpu", "PYTHON": sys.executable, "SHAPES": "smaller"}
    result = subprocess.run([SCRIPT, tmp_path / "out"], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "bench-smaller-sdpa: FAILED (2)" in result.stdout and "tests: ok" in result.stdout
    assert "unknown shape 'smaller'" in (tmp_path / "out" / "bench-smaller-sdpa.txt").read_text()
