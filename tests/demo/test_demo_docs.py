# SPDX-License-Identifier: Apache-2.0
"""What docs/demo.md says and shows."""

import re
from pathlib import Path

from vtprune.demo.uploads import LIMITS

PAGE = (Path(__file__).parents[2] / "docs" / "demo.md").read_text(encoding="utf-8")


def test_the_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"<!-- tested: demo -->\n```python\n(.*?)```", PAGE, re.S)
    exec(code, {})
    assert capsys.readouterr().out.splitlines() == ["full 2 144", "mmtok 2 36", "fastv 2 21"]
    assert (tmp_path / "kept.png").exists()


def test_the_limits_are_those_of_the_code():
    words = re.sub(r"\s+", " ", PAGE)
    assert f"may have {LIMITS.bytes >> 20} MB" in words
    assert f"a frame, {LIMITS.pixels // 10**6} million pixels" in words
    assert f"a clip {LIMITS.frames:,} frames and {LIMITS.clip_pixels / 1e9:.1f} billion pixels" in words
