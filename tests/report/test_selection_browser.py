"""select.html in a real browser, at two widths: nothing is cut off, and there is no console message."""

from __future__ import annotations

from pathlib import Path

from distil_tl.report.selection import render_selection
from tests.helpers.browser import MARKS, chromium
from tests.helpers.selection_pages import large_content

pytestmark = MARKS


def test_nothing_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "select.html"
    path.write_text(
        str(render_selection(large_content(), "select-flowers", f"{tmp_path}/runs/select-flowers/best.yaml"))
    )
    with chromium() as page:
        for width in (390, 1280):
            page.show(path, width)
            assert page.errors() == []
            assert page.requests() == [path.as_uri()]
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            outside = page.evaluate(
                "[...document.querySelectorAll('main *')].filter(e => {const r = e.getBoundingClientRect();"
                "return r.width && (r.right > innerWidth + 1 || r.left < -1)}).map(e => e.outerHTML.slice(0, 99))"
            )
            assert outside == []
            inside = "[...document.querySelectorAll('.stack, .cards dd, figure, .settings')]"
            scrolls = page.evaluate(
                f"{inside}.filter(e => e.scrollWidth > e.clientWidth && e.clientWidth)"
                ".map(e => `${e.className} ${e.getAttribute('aria-label')} ${e.scrollWidth} > ${e.clientWidth}`)"
            )
            assert scrolls == [], width
            clipped = page.evaluate(
                "[...document.querySelectorAll('.heat text')].filter(e => e.getBoundingClientRect().right >"
                " e.ownerSVGElement.getBoundingClientRect().right).map(e => e.textContent)"
            )
            assert clipped == []
            points = page.evaluate("document.querySelectorAll('.plot .point').length")
            assert points == 8
