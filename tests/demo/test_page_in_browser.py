# SPDX-License-Identifier: Apache-2.0
"""The demo in a real browser: it answers, tokens go by click, links restore, and nothing comes from elsewhere."""

import time
from urllib.parse import urlsplit

import pytest
from browser import CHROMIUM, Browser

pytest.importorskip("gradio")

from served import served

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

ANSWER = "document.querySelector('#vtprune-answer-{} textarea')?.value"
PICTURE = "document.querySelector('#vtprune-picture-{} img')"
LINK = "[...document.querySelectorAll('textarea')].map(e => e.value).find(v => v.startsWith('http'))"
# Visible components that reach over the window's right edge, in no box that scrolls.
OFF_THE_PAGE = """
[...document.querySelectorAll('.block, h1, p')]
  .filter(e => !e.closest('.table-wrap') && e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.outerHTML.slice(0, 100))
"""
# Pairs of components beside or below each other that share some of the page.
OVERLAPS = """
(() => {
  const blocks = [...document.querySelectorAll('.block')].filter(e => e.getBoundingClientRect().width > 0);
  const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  return blocks.flatMap((a, i) => blocks.slice(i + 1)
    .filter(b => !a.contains(b) && !b.contains(a) && meet(a.getBoundingClientRect(), b.getBoundingClientRect()))
    .map(b => a.outerHTML.slice(0, 80) + b.outerHTML.slice(0, 80)));
})()
"""


@pytest.fixture(scope="module")
def address():
    with served() as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


def wait_for(browser, script, seconds=60):
    """The value of an expression, once it is true."""
    end = time.monotonic() + seconds
    while not (value := browser.evaluate(script)):
        assert time.monotonic() < end, script
        time.sleep(0.1)
    return value


def click_on(browser, column, x, y):
    """Clicks on a picture at shares of its width and height."""
    wait_for(browser, PICTURE.format(column) + "?.complete")
    browser.evaluate(PICTURE.format(column) + ".scrollIntoView({block: 'center', behavior: 'instant'})")
    box = "(r => [r.left, r.top, r.width, r.height])(" + PICTURE.format(column) + ".getBoundingClientRect())"
    left, top, width, height = browser.evaluate(box)
    for kind in ("mousePressed", "mouseReleased"):
        point = {"x": left + x * width, "y": top + y * height}
        browser.call("Input.dispatchMouseEvent", type=kind, **point, button="left", clickCount=1)


def test_it_answers_and_tokens_go_by_click_and_the_link_restores_them(browser, address):
    browser.open(address)
    wait_for(browser, "document.querySelector('#vtprune-run') !== null")
    browser.evaluate("document.querySelector('#vtprune-run').click()")
    wait_for(browser, ANSWER.format(1))
    assert "tokens" not in wait_for(browser, LINK)
    click_on(browser, 0, 0.5 / 12, 0.5 / 12)
    wait_for(browser, ANSWER.format(4))
    link = browser.evaluate(LINK)
    assert link.endswith("&tokens=1-143")
    click_on(browser, 4, 2.5 / 12, 1.5 / 12)
    wait_for(browser, f"{LINK}.endsWith('&tokens=1-13.15-143')")

    browser.open(link)
    wait_for(browser, ANSWER.format(4))
    assert browser.evaluate(LINK) == link


def test_a_link_that_somebody_wrote_gives_a_message(browser, address):
    browser.open(address + "?question=<b>a</b>&keep_ratio=7")
    assert "at most 1" in wait_for(browser, "document.querySelector('#vtprune-message textarea')?.value")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_everything_has_its_place(browser, address, width, dark, tmp_path):
    query = "?question=How+many+digits+are+there%3F&method=auto&method=fastv&keep_ratio=0.25&example=3&tokens=1-99"
    browser.open(address + query, width=width, dark=dark)
    wait_for(browser, ANSWER.format(4))
    wait_for(browser, PICTURE.format(4) + "?.complete")
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.evaluate(OFF_THE_PAGE) == []
    assert browser.evaluate(OVERLAPS) == []
    browser.screenshot(tmp_path / "demo.png")
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    others = {url for url in asked if urlsplit(url).scheme in ("http", "https") and not url.startswith(address)}
    assert asked and not others
