"""The report in a real browser: its layout, no console messages, tooltips on the curves, printing."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from distil_tl.report import write_report
from tests.helpers.browser import MARKS, Page, chromium
from tests.helpers.report_runs import EVIL, build_run

pytestmark = MARKS


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [EVIL, "a-class-with-a-very-long-name-and-no-spaces", "rose", "tulip"]
    run = build_run(tmp_path_factory.mktemp("runs") / "browser", names)
    summary = json.loads((run / "summary.json").read_text())
    for i, stage in enumerate(summary["stages"].values()):
        stage |= {"train_seconds": 100.0, "data_wait_seconds": 20.0 * i}
    (run / "summary.json").write_text(json.dumps(summary))
    return write_report(run)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1400])
def test_the_layout_fits_the_viewport(page, report, width, scheme):
    page.show(report, width, scheme)
    assert page.errors() == []
    assert page.requests() == [report.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.evaluate(
        "[...document.querySelectorAll('.plot[data-chart]')].map(p => {const r = p.getBoundingClientRect();"
        "const c = [...p.querySelectorAll('.curve')].map(e => e.getBoundingClientRect());"
        "return [r.left, r.right, r.width, r.height,"
        "Math.min(...c.map(b => b.left)), Math.max(...c.map(b => b.right)),"
        "Math.min(...c.map(b => b.top)) - r.top, r.bottom - Math.max(...c.map(b => b.bottom))]})"
    )
    assert len(boxes) == 4
    for left, right, wide, high, first, last, above, below in boxes:
        assert 0 <= left < right <= width
        assert wide > 200
        assert high > 100
        assert first >= left - 4
        assert right - 20 < last <= right + 4
        assert min(above, below) > -4
    tops = page.evaluate("[...document.querySelectorAll('.pair > figure')].map(f => f.getBoundingClientRect().top)")
    assert len(tops) == 3, "loss and accuracy; the reliability diagram of val"
    assert (tops[0] == tops[1]) == (width > 820), "side by side, at one height"
    plot, curves, bars = page.evaluate(
        "(p => [[p], p.querySelectorAll('.dots'), p.querySelectorAll('.band')].map(s => [...s].map(e => {"
        "const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]})))"
        "(document.querySelector('.diagrams .plot'))"
    )
    ((left, top, right, bottom),) = plot
    assert (len(curves), len(bars)) == (2, 10)
    assert right <= width
    for x0, y0, x1, y1 in [*curves, *bars]:
        assert left - 4 <= x0 < x1 <= right + 4
        assert top - 4 <= y0 < y1 <= bottom + 4
    tables = "[...document.querySelectorAll('.stack, .scroll:has(.heat)')]"
    cut_off = page.evaluate(f"{tables}.filter(e => e.scrollWidth > e.clientWidth).length")
    assert cut_off == 0 or width == 768, "on a tablet wide tables scroll"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 19, 22)"
    assert dark == (scheme == "dark")


def test_labels_of_a_chart_do_not_overlap(page, report):
    for width in (360, 1400):
        page.show(report, width)
        overlaps = page.evaluate(
            "[...document.querySelectorAll('.plot')].flatMap(p => {"
            "const t = [...p.querySelectorAll('.tick')].map(e => [e.textContent, e.getBoundingClientRect()]);"
            "return t.flatMap(([a, x], i) => t.slice(i + 1)"
            ".filter(([b, y]) => x.left < y.right && y.left < x.right"
            " && x.top + 3 < y.bottom && y.top + 3 < x.bottom).map(([b]) => a + ' / ' + b))})"
        )
        assert overlaps == []


def test_the_tooltip_shows_the_values_at_the_pointer(page, report):
    page.show(report, 1200)
    place = "document.querySelectorAll('.plot')[1].getBoundingClientRect()"
    x, y = page.evaluate(f"(r => [r.left + r.width / 2, r.top + r.height / 2])({place})")
    assert page.evaluate("getComputedStyle(document.querySelector('.readout')).display") == "none"
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    words = page.evaluate("document.querySelectorAll('.readout')[1].innerText")
    step, *values = words.splitlines()
    assert step == "step 1,200, layer4"
    val = next(
        line
        for line in map(json.loads, (report.parent / "metrics.jsonl").read_text().splitlines())
        if line["split"] == "val" and line["step"] == 1200
    )
    assert f"{val['top1'] * 100:.1f} %" in " ".join(values)
    spot = page.evaluate("(r => [r.left, r.top])(document.querySelectorAll('.spot.c-val')[1].getBoundingClientRect())")
    assert abs(spot[0] + 4.5 - x) < 3
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert page.evaluate("document.querySelectorAll('.over').length") == 0
    assert page.errors() == []


def test_it_prints(page, report):
    page.show(report, 1000, "dark")
    pdf = base64.b64decode(page.call("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF")
    page.show(report, 720)
    page.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert page.evaluate("document.documentElement.scrollWidth") <= 720
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.errors() == []
