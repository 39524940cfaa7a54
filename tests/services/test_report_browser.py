"""The report in a real browser: Chromium, no network, wide and narrow, light, dark and print."""

from __future__ import annotations

import os
import runpy
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from radloop.monitoring import report, views

pytestmark = pytest.mark.services
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# Least contrast between any text and what lies behind it (WCAG 2.2, 1.4.3), by walking up to the first opaque background.
CONTRAST = """() => {
  const rgb = c => { const m = c.match(/[\\d.]+/g).map(Number);
    if (c.startsWith('color(srgb')) { m[0] *= 255; m[1] *= 255; m[2] *= 255; } return m.length < 4 ? [...m, 1] : m; };
  const lum = c => { const f = v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
    return 0.2126 * f(c[0]) + 0.7152 * f(c[1]) + 0.0722 * f(c[2]); };
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c[3] > 0.99) return c; } return [255, 255, 255, 1]; };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !e.getClientRects().length || e.closest('.hidden, .skip')) continue;
    if (e.tagName === 'title') continue;
    const s = getComputedStyle(e);
    const [a, b] = [lum(rgb(e.closest('svg') ? s.fill : s.color)), lum(behind(e))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), e.textContent.trim().slice(0, 40)]);
  }
  return found.sort((x, y) => x[0] - y[0])[0];
}"""

# Elements that stick out of the page and cannot be scrolled to within a box of their own.
STICKING_OUT = """() => [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, .hidden, .skip, svg')
  && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.tagName + ' ' + e.textContent.trim().slice(0, 40))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A running Chromium."""
    if CHROMIUM is None:
        why = "no Chromium on this machine: `make test-deps` installs it"
        if "services" in os.environ.get("RADLOOP_REQUIRE", ""):
            pytest.fail(why)
        pytest.skip(why)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A full report, an empty one, and one whose every text is hostile."""
    here = Path(__file__).resolve().parents[1] / "unit" / "monitoring"
    sample = runpy.run_path(str(here / "sample_report.py"))["sample"]()
    folder = tmp_path_factory.mktemp("report")
    full = report.write(sample, folder / "full.html")
    empty = report.write({}, folder / "empty.html")
    evil = (
        "<script>document.title='owned'</script>\"><img src=https://evil.example/x onerror=\"document.title='owned'\">"
    )
    sample["project"] = {key: value + evil for key, value in sample["project"].items()}
    sample["quarantine"] = [{**row, "meaning": evil, "reason": evil} for row in sample["quarantine"]]
    sample["flow"]["steps"][0]["name"] = evil
    sample["timing"][0]["name"] = "W" * 300  # nothing to break the line at
    return {"full": full, "empty": empty, "hostile": report.write(sample, folder / "hostile.html")}


class Visit:
    """One page opened, with all that it said and asked for."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def network(self) -> list[str]:
        """Requests to anything but the file itself and what it carries."""
        return [url for url in self.asked if not url.startswith(("file:", "data:"))]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 768, 1280])
@pytest.mark.parametrize("name", ["full", "empty", "hostile"])
def test_the_page_is_quiet_whole_and_readable(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    """A report that overflows a phone, or that a colour scheme makes unreadable, is not read."""
    with Visit(browser, pages[name], width, scheme) as visit:
        page = visit.page
        assert visit.network() == []
        assert visit.said == []
        assert page.title() != "owned"
        sections = page.evaluate("[...document.querySelectorAll('section')].map(s => s.id)")
        assert sections == ["summary", *(one for one, *_ in views.SECTIONS)]
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(STICKING_OUT) == []
        ratio, text = page.evaluate(CONTRAST)
        assert ratio >= 4.5, (ratio, text)


def test_images_decode_and_have_words(browser: Any, pages: dict[str, Path]) -> None:
    """A broken image is an example nobody saw."""
    with Visit(browser, pages["full"], 1280) as visit:
        images = visit.page.evaluate("""async () => Promise.all([...document.images].map(async i => {
            i.loading = 'eager'; await i.decode(); return [i.naturalWidth, i.naturalHeight, i.alt.length] }))""")
    assert len(images) == 6
    assert all((width, height) == (384, 192) and words > 40 for width, height, words in images)


def test_links_lead_somewhere_and_headings_are_in_order(browser: Any, pages: dict[str, Path]) -> None:
    """With a keyboard or a screen reader the headings and the list of sections are the page."""
    with Visit(browser, pages["full"], 1280) as visit:
        page = visit.page
        dead = "[...document.querySelectorAll('a')].filter(a => !document.querySelector(a.getAttribute('href'))).length"
        assert page.evaluate(dead) == 0
        levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        assert page.evaluate("document.querySelectorAll('table th:not([scope])').length") == 0
        unnamed = "[...document.querySelectorAll('.scroll')].filter(s => !s.getAttribute('aria-label')).length"
        assert page.evaluate(unnamed) == 0
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids))


def test_a_verdict_is_never_told_by_colour_alone(browser: Any, pages: dict[str, Path]) -> None:
    """One man in twelve cannot tell the red from the green."""
    with Visit(browser, pages["full"], 1280) as visit:
        badges = visit.page.evaluate("""[...document.querySelectorAll('.badge')].map(b =>
            [b.className.replace(' big', ''), b.textContent.trim(), b.querySelector('svg').innerHTML.length])""")
    assert {kind for kind, *_ in badges} == {"badge pass", "badge stop", "badge unknown"}
    shapes: dict[str, set[int]] = {}
    for kind, words, shape in badges:
        assert words
        shapes.setdefault(kind, set()).add(shape)
    assert all(len(found) == 1 for found in shapes.values())
    assert len({next(iter(found)) for found in shapes.values()}) == 3


def test_it_prints(browser: Any, pages: dict[str, Path]) -> None:
    """The sign-off is on paper in many departments."""
    with Visit(browser, pages["full"], 1280, "dark") as visit:
        visit.page.emulate_media(media="print")
        assert visit.page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
        ink = visit.page.evaluate("getComputedStyle(document.body).color")
        assert ink == "rgb(17, 17, 17)"
        ratio, text = visit.page.evaluate(CONTRAST)
        assert ratio >= 4.5, (ratio, text)
        pdf = visit.page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 50_000
