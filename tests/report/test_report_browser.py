"""The report in a real browser: its layout, no console messages, tooltips on the curves, printing."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distil_tl.report import write_report
from tests.helpers.report_runs import EVIL, build_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
    "about:blank",
]

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)"),
    pytest.mark.skipif(shutil.which("bash") is None, reason="bash hands the debugging pipe to Chromium"),
    pytest.mark.timeout(180),
]


class Page:
    """One tab, controlled over the DevTools pipe: JSON messages that end with a zero byte."""

    def __init__(self, source: int, sink: int) -> None:
        self._source, self._sink = os.fdopen(source, "rb", 0), os.fdopen(sink, "wb", 0)
        self._buffer, self._next, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = self._source.read(1 << 16)
            assert data, "Chromium has exited"
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        return dict(json.loads(message))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._next += 1
        message = {"id": self._next, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._sink.write(json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._next:
            self.events.append(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def evaluate(self, script: str) -> Any:
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def show(self, path: Path, width: int, scheme: str = "light", height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", media="", features=[feature])
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def errors(self) -> list[dict[str, Any]]:
        """Exceptions, console and log messages, which include blocked requests and policy violations."""
        self.evaluate("0")
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event.get("method") in bad]

    def requests(self) -> list[str]:
        sent = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [str(e["params"]["request"]["url"]) for e in sent]


@contextlib.contextmanager
def chromium() -> Iterator[Page]:
    """A headless Chromium with a new profile, terminated at the end of the block."""
    # Chromium reads descriptor 3 and writes 4. Ours have higher numbers until bash moves them there.
    commands, to_browser = os.pipe()
    from_browser, answers = os.pipe()
    inner = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (commands, answers)]
    os.close(commands)
    os.close(answers)
    start = f'exec "$0" "$@" 3<&{inner[0]} 4>&{inner[1]}'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            ["bash", "-c", start, str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=inner,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in inner:
            os.close(fd)
        try:
            yield Page(from_browser, to_browser)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


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
