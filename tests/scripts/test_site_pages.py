# SPDX-License-Identifier: Apache-2.0
"""The site: links of pages fit their places on it, and all of it can be read without a network."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="not installed: the extra docs")
SCRIPT = "site_pages"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_links_fit_the_place_of_a_page(script):
    text = "[a](docs/methods.md#fastv) [b](https://x.org/a.md) [c](vtprune/auto.py) [d](eval/presets) [e](#there)"
    moved = (
        "[a](methods.md#fastv) [b](https://x.org/a.md) [c](source/vtprune/auto.py.txt) "
        "[d](source/eval/presets/index.md) [e](#there)"
    )
    assert script.moved(text, ROOT / "README.md", "index.md") == moved
    text = "[home](../README.md) [other](tune.md) [code](../vtprune/auto.py)"
    moved = "[home](index.md) [other](tune.md) [code](source/vtprune/auto.py.txt)"
    assert script.moved(text, ROOT / "docs" / "results.md", "results.md") == moved


def test_fields_of_docstrings_become_lists(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    site_fields = importlib.import_module("site_fields")

    text = "What it is.\n\nFields\n    a, b: two numbers, one\n        and the other.\n    c: text.\nRaises Error.\n"
    expected = (
        "What it is.\n\n**Fields**\n\n* `a`, `b`: two numbers, one\n    and the other.\n* `c`: text.\n\nRaises Error.\n"
    )
    assert site_fields.SECTION.sub(site_fields.listed, text) == expected


@pytest.mark.slow
def test_nothing_is_read_from_a_network(site):
    loaded = re.compile(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//|<link[^>]*\shref=\"?(?:https?:)?//")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    assert not [page.name for page in pages if loaded.search(page.read_text(encoding="utf-8"))]
    styles = re.compile(r"url\(['\"]?(?:https?:)?//|@import ['\"]?(?:https?:)?//")
    assert not [style.name for style in site.rglob("*.css") if styles.search(style.read_text(encoding="utf-8"))]


@pytest.mark.slow
def test_the_reference_has_every_method(site):
    from vtprune import catalogue

    text = (site / "reference" / "methods.html").read_text(encoding="utf-8")
    missing = [name for name, cls in catalogue.CLASSES.items() if f'id="vtprune.methods.{name}.{cls}"' not in text]
    assert not missing


def test_notebooks_are_pages(site):
    text = (site / "notebooks" / "own_method.html").read_text(encoding="utf-8")
    assert "Write a method with its own signal" in text and "EncoderSignal" in text
    assert 'href="notebooks/own_method.html"' in (site / "index.html").read_text(encoding="utf-8")
