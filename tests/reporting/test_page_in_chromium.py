"""The page as a person sees it: in a real browser, on a desk and on a phone, in the light and in the dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fixify.reporting.page import write_page
from fixify.reporting.run_report import report_runs
from fixify.reporting.runs import read_runs, runs_in

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

# What is looked at, in one call: a call for each would take a minute.
LOOK = """
() => {
  const all = selector => [...document.querySelectorAll(selector)];
  all('details').forEach(one => one.open = true);
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = node => channels(getComputedStyle(node).backgroundColor);
  // Contrast by WCAG 2, with the nearest background below.
  const contrast = (selector, property) => Math.min(...all(selector).map(node => {
    let behind = node;
    while (ground(behind)[3] === 0) behind = behind.parentElement;
    const [a, b] = [light(channels(getComputedStyle(node)[property])), light(ground(behind))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }));
  const boxes = selector => all(selector).map(node => node.getBoundingClientRect());
  return {
    hacked: typeof hacked,
    classes: all('.classes th[scope=row]').map(node => node.textContent),
    width: Math.max(document.documentElement.scrollWidth, document.body.scrollWidth),
    stacks: all('.stack').length,
    scrolling: all('.wide:has(.stack)').filter(node => node.scrollWidth > node.clientWidth + 1).length,
    charts: boxes('svg.chart').map(box => [box.left, box.right]),
    texts: boxes('svg.chart text').map(box => [box.left, box.right, box.height]),
    letters: Math.min(contrast('h1, td, th, dd, pre', 'color')),
    faint: Math.min(contrast('.note, summary, footer', 'color'), contrast('.chart .tick, .chart .end', 'fill')),
    lines: contrast('.chart .line', 'stroke'),
    ground: getComputedStyle(document.body).backgroundColor,
  };
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page_file(two_runs: Path) -> Path:
    path = two_runs / "report.html"
    path.write_text(write_page(report_runs(read_runs(runs_in(two_runs)))))
    return path


def test_in_both_colours_and_widths(browser: Any, page_file: Path) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        for width in (1280, 390):
            page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
            complaints: list[str] = []
            requests: list[str] = []
            page.on("console", lambda message, to=complaints: to.append(message.text))
            page.on("pageerror", lambda error, to=complaints: to.append(str(error)))
            page.on("request", lambda request, to=requests: to.append(request.url))
            page.goto(page_file.as_uri())
            seen = page.evaluate(LOOK)
            assert complaints == []
            assert [url for url in requests if not url.startswith("data:")] == [page_file.as_uri()]
            assert seen["hacked"] == "undefined"
            assert any(name.startswith("<script>hacked") for name in seen["classes"])
            assert seen["width"] <= width
            # On a phone nothing scrolls sideways but the long tables at the end.
            assert seen["stacks"] >= 3 and (width > 600 or seen["scrolling"] == 0)
            assert len(seen["charts"]) == 4
            assert all(left >= 0 and right <= width and right - left > 250 for left, right in seen["charts"])
            # Legible: the height of a line of text, not of its letters.
            assert all(left >= 0 and right <= width and height >= 12 for left, right, height in seen["texts"])
            assert seen["letters"] >= 4.5 and seen["faint"] >= 4.5 and seen["lines"] >= 3
            grounds[scheme] = seen["ground"]
            page.close()
    assert grounds["light"] != grounds["dark"]


def test_it_is_read_out_in_words(browser: Any, page_file: Path) -> None:
    page = browser.new_page()
    page.goto(page_file.as_uri())
    drawing = page.get_by_role("img", name="Validation top-1, %")
    assert "fixed: from 50 to 85 % at epoch 3" in drawing.locator("desc").text_content()
    assert page.get_by_role("heading", level=1).text_content() == "fixed · learned"
    page.close()
