# SPDX-License-Identifier: Apache-2.0
"""The pages for readers: links lead to files, and the README links every page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md"))


def links(page: Path) -> set[Path]:
    """The files and folders that a page links or shows."""
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8"))
    return {(page.parent / target).resolve() for target in targets}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    missing = [str(target) for target in links(page) if not target.exists()]
    assert not missing


def test_the_readme_links_every_page():
    assert set((ROOT / "docs").resolve().glob("*.md")) <= links(ROOT / "README.md")
