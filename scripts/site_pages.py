# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs: the pages of the site that are no files in docs/.

The README is the home page. What pages link outside docs/ gets a place under source/: pages as pages, folders as lists
of their files, other files as text, so that every link leads somewhere without a network. The API reference of the
methods follows their catalogue. Notebooks are pages of their cells.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?!https?://|#)([^)#\s]+)")
HOME = {ROOT / "README.md": "index.md"}


def place(path: Path) -> str:
    """Where a file or folder of the repository lies on the site."""
    if path.is_relative_to(DOCS):
        shown = path.with_suffix(".md") if path.suffix == ".ipynb" else path
        return shown.relative_to(DOCS).as_posix()
    if path in HOME:
        return HOME[path]
    below = f"source/{path.relative_to(ROOT).as_posix()}"
    if path.is_dir():
        return f"{below}/index.md"
    return below if path.suffix == ".md" else f"{below}.txt"


def targets(text: str, path: Path) -> list[Path]:
    """The files and folders that a page at `path` links."""
    return [(path.parent / target).resolve() for target in LINK.findall(text)]


def moved(text: str, path: Path, uri: str) -> str:
    """The text of the page at `path`, with links that fit its place `uri` on the site."""

    def link(match: re.Match[str]) -> str:
        target = (path.parent / match[1]).resolve()
        return os.path.relpath(place(target), Path(uri).parent) if target.is_relative_to(ROOT) else match[1]

    return LINK.sub(link, text)


def folder_page(path: Path) -> str:
    """A list of the files in a folder."""
    files = sorted(child for child in path.iterdir() if child.is_file())
    return f"# {path.relative_to(ROOT)}\n\n" + "".join(f"* [{child.name}]({child.name})\n" for child in files)


def methods_page() -> str:
    """The API reference of all methods."""
    from vtprune import catalogue

    classes = (catalogue.load(name) for name in catalogue.CLASSES)
    entries = (f"::: {method.__module__}.{method.__name__}\n    options: {{members: false}}\n" for method in classes)
    return "# Methods\n\n[The table](../methods.md) compares them.\n\n" + "\n".join(entries)


def notebook_page(path: Path) -> str:
    """The cells of a notebook, in order."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ((cell["cell_type"], "".join(cell["source"])) for cell in cells)
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in texts) + "\n"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what docs/ does not hold."""
    files.append(File.generated(config, "reference/methods.md", content=methods_page()))
    for notebook in sorted(DOCS.rglob("*.ipynb")):
        files.append(File.generated(config, place(notebook), content=notebook_page(notebook)))
    waiting = [*HOME, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    for page in DOCS.rglob("*.md"):
        waiting += targets(page.read_text(encoding="utf-8"), page)
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not path.is_relative_to(ROOT) or path.is_relative_to(DOCS) or not path.exists():
            continue
        seen.add(path)
        if path.is_dir():
            text, source = folder_page(path), path / "index.md"
        elif path.suffix == ".md":
            text, source = path.read_text(encoding="utf-8"), path
        else:
            files.append(File.generated(config, place(path), abs_src_path=str(path)))
            continue
        waiting += targets(text, source)
        files.append(File.generated(config, place(path), content=moved(text, source, place(path))))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of pages in docs/ that leave it."""
    if page.file.abs_src_path is None:  # a page of `on_files`
        return markdown
    path = Path(page.file.abs_src_path)
    return moved(markdown, path, page.file.src_uri)
