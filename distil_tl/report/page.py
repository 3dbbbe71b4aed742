"""The page: its sections from top to bottom."""

from __future__ import annotations

import base64
import hashlib
from datetime import datetime, timezone
from pathlib import Path

from distil_tl.report import curves, tables, text
from distil_tl.report.confusion import Confusion, heat_map, pair_table, read_confusion
from distil_tl.report.head_search import search_maps
from distil_tl.report.load import Run, mapping
from distil_tl.report.markup import Child, Markup, h, join
from distil_tl.report.text import number
from distil_tl.utils.data_wait import is_notable

STATES = {
    "completed": ("\u2713", "good"),
    "preempted": ("\u25ae\u25ae", "paused"),
    "failed": ("\u2715", "bad"),
    "running": ("\u25cf", "live"),
}


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text("utf-8")


def render(run: Run) -> Markup:
    """The whole document."""
    style, script = _asset("style.css"), _asset("hover.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Defence in depth, besides the escaping: only this script may run, and nothing may be loaded.
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    body = _body(run)
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", http_equiv="Content-Security-Policy", content=policy),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("meta", name="color-scheme", content="light dark"),
        h("title", f"{run.name} \u00b7 distil_tl"),
        h("style", Markup(style)),
    )
    return join(
        Markup("<!doctype html>\n"),
        h("html", head, h("body", body, h("script", Markup(script))), lang="en"),
        Markup("\n"),
    )


def _body(run: Run) -> Markup:
    confusion = read_confusion(run)
    classes = tables.class_table(run, confusion.confused_with() if confusion else {})
    charts = h("div", curves.loss_chart(run), curves.accuracy_chart(run), class_="pair")
    environment = tables.environment_table(run)
    return h(
        "main",
        _header(run),
        _cards(run),
        _notes(run),
        h("section", h("h2", "Training"), charts, curves.lr_chart(run)),
        h("section", h("h2", "Stages"), tables.stage_table(run)),
        _section(
            "Head search", "Val top-1 of each candidate head. The outlined one was chosen.", search_maps(run), wide=True
        ),
        h("section", h("h2", "Evaluation"), _evaluation(run)) if run.evaluation else None,
        _section("Classes", "Sorted by F1, lowest first.", classes),
        _section(
            "Confusion matrix",
            "Rows are true classes. Correct predictions are blue, wrong ones orange, by share of the row.",
            [heat_map(confusion), _most_confused(confusion)] if confusion else None,
            wide=True,
        ),
        _section("Mistakes", "The most confident wrong predictions.", tables.mistake_table(run)),
        h(
            "section",
            h("h2", "Throughput"),
            curves.throughput_chart(run),
            tables.data_waits(run),
            tables.peak_memory(run),
        ),
        h(
            "section",
            h("h2", "Environment and configuration"),
            h("details", h("summary", "Environment"), environment) if environment else None,
            h("details", h("summary", "config.yaml"), h("pre", run.config)) if run.config else None,
            h("p", "The run directory has no env.json and no config.yaml.", class_="empty")
            if not environment and not run.config
            else None,
        ),
        _footer(run),
    )


def _most_confused(confusion: Confusion) -> Markup | None:
    pairs = pair_table(confusion)
    return h("div", h("h3", "Most confused pairs"), pairs) if pairs else None


def _section(title: str, hint: str, content: Child, *, wide: bool = False) -> Markup | None:
    if not content:
        return None
    inner = h("div", content, class_="confusion") if wide else content
    return h("section", h("h2", title), h("p", hint, class_="hint"), inner)


def _status(run: Run) -> tuple[str, str, str]:
    """Symbol, status and colour. Without a summary the run is in progress or was killed; both show as in progress."""
    status = str(run.summary.get("status") or "running")
    symbol, style = STATES.get(status, ("?", "paused"))
    return symbol, "in progress" if status == "running" else status, style


def _header(run: Run) -> Markup:
    symbol, status, style = _status(run)
    facts = [
        text.timestamp(run.env.get("start_time")) if run.env.get("start_time") else "",
        f"{len(run.classes):,} class{'es' if len(run.classes) != 1 else ''}" if run.classes else "",
        " \u2192 ".join(band.name for band in run.bands),
        str(run.env.get("device") or ""),
        str(run.env.get("host") or ""),
    ]
    pill = h("span", h("span", symbol, aria_hidden="true"), " ", status, class_=f"pill {style}")
    return h(
        "header",
        h("div", h("h1", run.name), pill, class_="name"),
        h("p", " \u00b7 ".join(fact for fact in facts if fact), class_="facts"),
    )


def _total_seconds(run: Run) -> tuple[float | None, str]:
    total = number(run.summary.get("total_seconds"))
    if total is not None:
        return total, ""
    times = [m.time for m in run.metrics if m.time is not None]
    return (max(times) - min(times), "first to last metric") if len(times) > 1 else (None, "")


def _speed(run: Run) -> tuple[float | None, str]:
    """Images per second of the last stage that read images; with cached features the rate is much higher."""
    stages = mapping(run.summary, "stages")
    measured = [
        (number(mapping(stages, name).get("images_per_second")), name)
        for name in stages
        if mapping(stages, name).get("cached") is not True
    ]
    recorded = [(speed, name) for speed, name in measured if speed is not None]
    if recorded:
        return recorded[-1][0], f"training, {recorded[-1][1]}"
    lines = [m for m in run.lines("train") if m.images_per_second is not None]
    return (lines[-1].images_per_second, f"training, {lines[-1].stage}") if lines else (None, "")


def _cards(run: Run) -> Markup:
    best, test = run.best, mapping(run.summary, "test")
    seconds, seconds_hint = _total_seconds(run)
    speed, speed_hint = _speed(run)
    when = f"val, {best.stage}" + (f" epoch {best.epoch}" if best.epoch is not None else "") if best else ""
    world = number(run.summary.get("world_size"))
    world = number(run.env.get("world_size")) if world is None else world
    memory = number(run.summary.get("peak_memory_mb"))
    test_top1 = number(test.get("top1"))
    cards: list[tuple[str, str, str]] = [("Best top-1", text.percent(best.top1 if best else None), when)]
    cards.append(("Macro F1", text.percent(best.macro_f1 if best else None), when))
    if test_top1 is not None:
        f1 = number(test.get("macro_f1"))
        cards.append(("Test top-1", text.percent(test_top1), f"macro F1 {text.percent(f1)}" if f1 else "test"))
    cards += [
        ("Total time", text.duration(seconds), seconds_hint),
        ("Images/s", text.rate(speed), speed_hint),
        (
            "World size",
            text.count(world),
            ("" if world is None else "rank" if world == 1 else "ranks")
            + (f", {memory / 1024:.1f}{text.SPACE}GiB peak" if memory else ""),
        ),
    ]
    return h(
        "dl",
        [h("div", h("dt", k), h("dd", v), h("dd", hint, class_="sub")) for k, v, hint in cards],
        class_="cards",
    )


def _notes(run: Run) -> Markup | None:
    notes = list(run.notes)
    if not run.metrics:
        notes.append("No metrics yet: the run has not completed its first logging interval.")
    elif not run.summary:
        notes.append("No summary.json: the run is in progress or was killed. The figures come from metrics.jsonl.")
    for band in run.bands:
        share, cached = (
            tables.data_wait(run, band.name),
            mapping(mapping(run.summary, "stages"), band.name).get("cached"),
        )
        if is_notable(share) and cached is not True:
            notes.append(
                f"Stage {band.name} waited for images during {text.percent(share, 0)} of its training. More CPUs for "
                "loader processes, or smaller image files, make it faster."
            )
    notes += tables.part_sizes(run)
    for key in ("error", "reason", "message"):
        if isinstance(run.summary.get(key), str):
            notes.append(str(run.summary[key]))
    return h("ul", [h("li", note) for note in notes], class_="notes") if notes else None


def _evaluation(run: Run) -> Markup:
    evaluation = run.evaluation
    figures = [
        ("Split", str(evaluation.get("split") or text.MISSING)),
        ("Images", text.count(number(evaluation.get("n")))),
        ("Top-1", text.percent(number(evaluation.get("top1")))),
        ("Top-5", text.percent(number(evaluation.get("top5")))),
        ("Macro F1", text.percent(number(evaluation.get("macro_f1")))),
        ("Loss", text.decimal(number(evaluation.get("loss")))),
    ]
    return h("dl", [h("div", h("dt", k), h("dd", v)) for k, v in figures], class_="line")


def _footer(run: Run) -> Markup:
    now = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    commit = mapping(run.env, "git").get("commit")
    dirty = " with local changes" if mapping(run.env, "git").get("dirty") is True else ""
    code = f" \u00b7 commit {commit[:12]}{dirty}" if isinstance(commit, str) and commit else ""
    return h("footer", f"Written by distil-tl report, {now} \u00b7 {len(run.metrics):,} lines of metrics{code}")
