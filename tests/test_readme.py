# SPDX-License-Identifier: Apache-2.0
"""The README is short, and what it shows runs as it is printed, on the built-in model in the place of a large one."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vtprune.eval import digitscenes

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = ROOT / "eval" / "digitscenes" / "model"
PICTURES = 20


def example(name: str) -> str:
    return re.search(rf"<!-- tested: {name} -->\n```\w*\n(.*?)```", TEXT, re.DOTALL).group(1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with photo.jpg, a checkpoint in my-model, and mine.jsonl with questions about pictures."""
    shutil.copytree(MODEL, tmp_path / "my-model")
    rows = []
    for index, scene in enumerate(digitscenes.examples(limit=PICTURES)):
        scene.image.save(tmp_path / f"{index}.png")
        rows.append({"image": f"{index}.png", "question": scene.question, "answers": [scene.answer]})
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    digitscenes.example(0).image.save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_short():
    assert len(TEXT.encode()) <= 12 * 1024


def test_every_block_is_tested_or_installs():
    blocks = re.findall(r"(<!-- tested: \w+ -->\n)?```\w*\n(.*?)```", TEXT, re.DOTALL)
    assert all(tested or "pip install" in text for tested, text in blocks)


def test_the_snippet_prunes(folder, capsys):
    code = example("prune").replace('"llava-hf/llava-1.5-7b-hf"', '"my-model"')
    assert '"my-model"' in code
    namespace = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), namespace)
    report = namespace["session"].report
    assert report.keep_ratio == 0.25 and report.final_tokens == [36] and report.original_tokens == [144]
    assert str(report) in capsys.readouterr().out


@pytest.mark.slow
def test_the_commands_run(folder):
    commands = example("commands").splitlines()
    assert len(commands) <= 5
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "vtprune"
        done = subprocess.run([sys.executable, "-m", "vtprune", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    for written in ("kept.png", "results/mine/report.html", "results/tune-mine/tuned.yaml"):
        assert (folder / written).stat().st_size > 0
