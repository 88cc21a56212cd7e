"""Reports in a real browser: they open, ask for nothing, and nothing in them is cut or unreadable.

Needs a Chromium; `.ci/run` fetches one where it can.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import esft
from tests import browser as browsers
from tests import reported

pytestmark = pytest.mark.skipif(
    browsers.find() is None, reason="no Chromium on this machine; ESFT_BROWSER names one"
)
KINDS = ("comparison", "run", "profile")
# As a phone in a dark room and a desk at noon show it.
SCREENS = [pytest.param(400, True, id="phone-dark"), pytest.param(1280, False, id="desk-light")]
# CSS pixels of the sheet inside its margins, upright and turned.
PAPER, PAPER_TURNED = 680, 1001


@pytest.fixture(scope="module")
def browser() -> Iterator[browsers.Browser]:
    with browsers.Browser(str(browsers.find())) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the report of a kind, made when it is first asked for."""
    save = {
        "comparison": reported.save_comparison,
        "run": reported.save_run,
        "profile": reported.save_profile,
    }

    @functools.cache
    def made(kind: str, hostile: bool = False) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        save[kind](folder, hostile=hostile)
        return esft.write_report(folder).html

    return made


@pytest.mark.parametrize(("width", "dark"), SCREENS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_on_a_screen(
    kind: str, width: int, dark: bool, browser: browsers.Browser, page: Callable[..., Path]
) -> None:
    with browser.open(page(kind), width=width, dark=dark) as tab:
        _asks_for_nothing(tab, page(kind))
        _is_not_cut(tab, width)
        _has_its_pictures(tab, page(kind).parent / "figures", width)
        _stands_out(tab, dark=dark)
        _is_well_formed(tab, page(kind).parent)


def _asks_for_nothing(tab: browsers.Tab, page: Path) -> None:
    assert tab.complaints() == []
    asked = [url for url in tab.requests() if not url.startswith("data:")]
    assert asked == [page.as_uri()]
    assert tab.value("document.title").startswith(("tiny-moe", "Experts of tiny-moe"))


def _is_not_cut(tab: browsers.Tab, width: int) -> None:
    assert tab.value("document.documentElement.scrollWidth") == width
    assert tab.value(_CUT) == []
    # Not because there is nothing.
    assert tab.value("document.querySelectorAll('td').length") > 10


def _has_its_pictures(tab: browsers.Tab, figures: Path, width: int) -> None:
    files = sorted(path.stem for path in figures.glob("*.svg"))
    assert files == sorted(path.stem for path in figures.glob("*.csv"))
    boxes = tab.value(_PICTURES)
    assert len(boxes) == len(files) >= 3
    for left, right, height, shapes in boxes:
        assert 0 <= left < right <= width
        assert right - left > 300  # on a phone as wide as the text
        assert height > 80
        assert shapes > 5
    names = tab.images()
    assert len(names) == len(set(names)) == len(files)
    assert all(len(name) > 10 for name in names)


def _stands_out(tab: browsers.Tab, *, dark: bool) -> None:
    found = tab.value(_CONTRASTS)
    assert len(found) > 50
    # WCAG 2.2, 1.4.3, level AA.
    assert [each for each in found if each["contrast"] < (3 if each["large"] else 4.5)] == []
    ground = tab.value("getComputedStyle(document.documentElement).backgroundColor")
    assert (_luminance(ground) < 0.05) == dark


def _is_well_formed(tab: browsers.Tab, folder: Path) -> None:
    levels = tab.value("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert tab.value(
        "[...document.querySelectorAll('table')].every(t => t.caption.innerText.length > 4 &&"
        " [...t.querySelectorAll('th')].every(h => h.scope))"
    )
    ids = tab.value("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    for link in tab.value("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))"):
        if link.startswith("#"):
            assert link[1:] in ids
        else:
            assert (folder / link).exists(), link


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_on_paper(kind: str, browser: browsers.Browser, page: Callable[..., Path]) -> None:
    with browser.open(page(kind), width=PAPER, dark=True) as tab:
        pdf = tab.pdf()
        sheets = len(re.findall(rb"/Type /Page\b", pdf))
        assert pdf.startswith(b"%PDF")
        assert 1 <= sheets <= 1 + tab.height // 500
        across = [float(size) for size in re.findall(rb"/MediaBox \[0 0 ([\d.]+)", pdf)]
        assert min(across) == pytest.approx(595, abs=2)  # points, of A4
        assert (max(across) > 800) == tab.value("document.querySelector('.wide.table') != null")
        tab.as_printed()
        for wide, width in tab.value(_PRINTED):
            assert width <= (PAPER_TURNED if wide else PAPER)
        # Paper is light.
        assert _luminance(tab.value("getComputedStyle(document.body).color")) < 0.05


def test_the_check_of_contrast_sees_pale_letters(browser: browsers.Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><title>x</title><p style='color:#777'>a</p><p style='color:#757575'>b</p>"
        "<svg width=200 height=50><rect width=200 height=50 fill='#000080'></rect>"
        "<text x=9 y=30 fill='#222'>c</text></svg>"
    )
    with browser.open(page) as tab:
        found = {each["text"]: each["contrast"] for each in tab.value(_CONTRASTS)}
    assert found["a"] == pytest.approx(4.48, abs=0.01)  # what checkers of contrast say of #777
    assert found["b"] == pytest.approx(4.61, abs=0.01)
    assert found["c"] < 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_text_whatever_is_in_them(
    kind: str, browser: browsers.Browser, page: Callable[..., Path]
) -> None:
    with browser.open(page(kind, hostile=True)) as tab:
        assert tab.complaints() == []
        assert [url for url in tab.requests() if not url.startswith("data:")] == [
            page(kind, hostile=True).as_uri()
        ]
        assert tab.value("document.querySelectorAll('script, img, [onerror]').length") == 0
        assert tab.value("document.title") not in ("owned", "1")
        assert reported.HOSTILE in tab.value("document.body.textContent")


def _luminance(colour: str) -> float:
    """Return the relative luminance of `rgb(r, g, b)`, WCAG 2.2."""
    channels = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


# Text nodes whose letters leave the page, their scroller's content, or their picture.
_CUT = """(() => {
  const found = [], page = document.documentElement.clientWidth;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const parent = node.parentElement;
    if (!node.data.trim() || parent.closest('style, .skip, title, desc')) continue;
    const scroller = parent.closest('.scroller, pre'), picture = parent.closest('svg');
    let left = 0, right = page, top = -Infinity, bottom = Infinity;
    if (picture) {
      ({left, right, top, bottom} = picture.getBoundingClientRect());
    } else if (scroller) {
      const box = scroller.getBoundingClientRect();
      if (box.left < 0 || box.right > page) found.push('scroller: ' + node.data);
      if (getComputedStyle(scroller).overflowX != 'auto') found.push('stuck: ' + node.data);
      left = box.left;
      right = box.left + scroller.scrollWidth;
    }
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) {
      if (box.left < left - 1 || box.right > right + 1 || box.top < top - 1 ||
          box.bottom > bottom + 1) found.push(node.data.trim());
    }
  }
  for (const element of document.querySelectorAll('p, li, dt, dd, h1, h2, figcaption, nav')) {
    if (element.scrollWidth > element.clientWidth + 1) found.push('overflow: ' + element.innerText);
  }
  return found;
})()"""

_PICTURES = """[...document.querySelectorAll('figure svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  return [box.left, box.right, box.height, svg.querySelectorAll('path, use, rect').length];
})"""

# Each table: whether its sheet is turned, and how wide it is.
_PRINTED = """[...document.querySelectorAll('table')].map(table => [
  table.parentElement.parentElement.classList.contains('wide'),
  table.getBoundingClientRect().width,
])"""

# Every text: its contrast with what lies below its middle, by WCAG 2.2.
_CONTRASTS = """(() => {
  const rgba = text => [...text.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const luminance = colour => {
    const [r, g, b] = colour.map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element, x, y) => {
    let layers = [];
    for (const each of document.elementsFromPoint(x, y)) {
      if (each === element || each.tagName == 'text' || each.tagName == 'tspan') continue;
      const style = getComputedStyle(each);
      const drawn = each instanceof SVGElement && each.tagName != 'svg' ? style.fill
                                                                       : style.backgroundColor;
      if (!drawn.startsWith('rgb')) continue;
      const colour = rgba(drawn);
      if (each instanceof SVGElement) colour[3] *= +style.fillOpacity * +style.opacity;
      layers.push(colour);
      if (colour[3] == 1) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const element = node.parentElement, style = getComputedStyle(element);
    if (!node.data.trim() || element.closest('style, title, desc, .skip')) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    const x = Math.min(box.left + box.width / 2, innerWidth - 1), y = box.top + box.height / 2;
    if (!box.width) continue;
    const below = ground(element, x, y);
    const colour = rgba(element instanceof SVGElement ? style.fill : style.color);
    const [high, low] = [luminance(over(colour, below)), luminance(below)].sort((a, b) => b - a);
    const size = parseFloat(style.fontSize), bold = +style.fontWeight >= 700;
    found.push({text: node.data.trim(), contrast: (high + 0.05) / (low + 0.05),
                large: size >= 24 || (bold && size >= 18.66)});
  }
  return found;
})()"""
