# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: nothing runs off, nothing overlaps, nothing is fetched, both themes."""

import base64
import io

import finished_runs
import numpy as np
import pytest
import tiny_eval
import tiny_video
from browser import CHROMIUM, Browser
from PIL import Image

from vtprune.eval.bench.config import BenchConfig
from vtprune.eval.bench.run import run as run_bench
from vtprune.eval.pages.report import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

LABELLED = "pool(scope=image, frames=2)"
OPEN_ALL = "document.querySelectorAll('details').forEach(d => d.open = true)"
# Of everything with a box: what stands further right than the window and in no box that scrolls.
OFF_THE_PAGE = """
[...document.querySelectorAll('main *, header *, footer *')]
  .filter(e => !e.closest('.scroll') && !e.closest('svg *') && e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.outerHTML.slice(0, 100))
"""
# Words that need more room than their box has, cells of tables above all.
CUT_OFF = """
[...document.querySelectorAll('td, th, p, figcaption, summary, li, h1, h2, h3, h4, dd, .card')]
  .filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline')
  .map(e => e.outerHTML.slice(0, 100))
"""
# Pairs of boxes that share some of the page: neighbours in the flow, and words of one plot.
OVERLAPS = """
(() => {
  const found = [];
  const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const check = elements => {
    const boxes = elements.map(e => e.getBoundingClientRect());
    for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++)
      if (meet(boxes[i], boxes[j])) found.push([elements[i], elements[j]].map(e => e.outerHTML.slice(0, 80)));
  };
  document.querySelectorAll('section, .plots, .cards, .card, .legend, .strips, nav, .example')
    .forEach(e => check([...e.children]));
  document.querySelectorAll('.chart').forEach(e => check([...e.querySelectorAll('text')]));
  document.querySelectorAll('tr').forEach(e => check([...e.children]));
  return found;
})()
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Images, a video and measurements of time on one page."""
    images, video = (tmp_path_factory.mktemp(name) for name in ("images", "video"))
    model = str(tiny_eval.save_model(tmp_path_factory.mktemp("model")))
    finished_runs.finish(model, images)
    pool = {"name": "pool", "scope": "image", "frames": 2}
    video_model = str(tiny_video.save_model(tmp_path_factory.mktemp("video_model")))
    finished_runs.finish(video_model, video, task="tiny_video", limit=5, methods=(pool, {"name": "divprune"}))
    bench = {"image_size": (56, 56), "methods": ({"name": "uniform"},), "output_tokens": (1,), "repeats": 1, "steps": 1}
    run_bench(BenchConfig(model=model, output=images, **bench))
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report([images, video], path)
    return path


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_everything_has_its_place(browser, page, width, dark):
    browser.open(page, width=width, dark=dark)
    browser.evaluate(OPEN_ALL)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.evaluate(OFF_THE_PAGE) == []
    assert browser.evaluate(CUT_OFF) == []
    assert browser.evaluate(OVERLAPS) == []


# Of every table that its box cuts, and not only in the last margin: a strip inside the box's edge, in the first row.
EDGES = """
(() => {
  const boxes = [...document.querySelectorAll('.scroll')].filter(e => e.querySelector('table'));
  return boxes.filter(e => e.scrollWidth > e.clientWidth + 13).map(e => {
    e.scrollLeft = %s;
    const box = e.getBoundingClientRect(), row = e.querySelector('tr').getBoundingClientRect();
    const left = box.left + e.clientLeft, right = left + e.clientWidth;
    return {x: right - 4 + scrollX, y: row.top + 1 + scrollY, width: 3, height: row.height - 3};
  });
})()
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [590, 390])
def test_a_table_that_goes_on_has_a_shade_at_its_edge(browser, page, width, dark):
    """And loses it where it ends. Windows this narrow have no bar at their side, which would move in a picture."""
    browser.open(page, width=width, dark=dark)
    plain = browser.evaluate("getComputedStyle(document.querySelector('tbody th')).backgroundColor")
    cut = [shade(browser, edge, plain) for edge in browser.evaluate(EDGES % "0")]
    ended = [shade(browser, edge, plain) for edge in browser.evaluate(EDGES % "e.scrollWidth")]
    assert len(cut) == len(ended) >= 2
    assert min(cut) > 15 and max(ended) < 5


def shade(browser, edge, plain):
    """Mean difference, of 255, between a part of the page and a colour."""
    shot = browser.call("Page.captureScreenshot", captureBeyondViewport=True, clip=edge | {"scale": 1})
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB"), dtype=float)
    colour = [int(part) for part in plain[plain.index("(") + 1 : -1].split(",")]
    return float(np.abs(pixels - colour).mean())


def test_nothing_is_fetched_and_nothing_complains(browser, page):
    browser.open(page)
    browser.evaluate(OPEN_ALL)
    fetched = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert fetched[0] == page.resolve().as_uri()
    assert fetched[1:] and all(url.startswith("data:") for url in fetched[1:])
    complaints = {
        "Runtime.consoleAPICalled",
        "Runtime.exceptionThrown",
        "Log.entryAdded",
        "Page.javascriptDialogOpening",
    }
    assert [e for e in browser.events if e["method"] in complaints] == []
    assert browser.evaluate("document.title") == "vtprune: nasty, tiny_video"


def test_plots_pictures_and_tables_are_drawn(browser, page):
    browser.open(page)
    browser.evaluate(OPEN_ALL)
    sizes = browser.evaluate(
        "[...document.querySelectorAll('.chart, .picture, table')].map(e => e.getBoundingClientRect())"
        ".map(b => Math.min(b.width, b.height))"
    )
    assert len(sizes) > 40 and min(sizes) > 20
    assert LABELLED in browser.evaluate("document.body.innerText")
    assert "Time and memory" in browser.evaluate("document.body.innerText")


def test_dropped_patches_are_dimmed(browser, page):
    browser.open(page)
    dark = browser.evaluate(
        "[...document.querySelectorAll('.kept .picture')].map(e => [e.getAttribute('aria-label'),"
        "e.querySelector('.dropped').getBBox().width > 0, getComputedStyle(e.querySelector('.dropped')).fillOpacity])"
    )
    assert dark and all(shown and float(opacity) > 0.5 for _, shown, opacity in dark)


def test_themes_differ_and_text_stands_out_in_both(browser, page):
    colours = []
    for dark in (False, True):
        browser.open(page, dark=dark)
        colours.append(
            browser.evaluate(
                "['color', 'backgroundColor'].map(n => getComputedStyle(document.body)[n])"
                ".concat(getComputedStyle(document.querySelector('.chart text')).fill)"
            )
        )
    (text, back, words), (dark_text, dark_back, dark_words) = colours
    assert brightness(text) == brightness(words) < 80 and brightness(back) > 200
    assert brightness(dark_text) == brightness(dark_words) > 180 and brightness(dark_back) < 60


def brightness(colour):
    red, green, blue = (int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
    return (red + green + blue) / 3
