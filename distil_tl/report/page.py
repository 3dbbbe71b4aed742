"""The page: what a person looks at, in the order they look at it."""

from __future__ import annotations

import base64
import hashlib
from datetime import datetime, timezone
from pathlib import Path

from distil_tl.report import curves, tables, text
from distil_tl.report.confusion import heat_map, pair_table, read_confusion
from distil_tl.report.load import Run, section
from distil_tl.report.markup import Child, Markup, h, join
from distil_tl.report.search import search_maps
from distil_tl.report.text import number

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
    # A second lock behind the escaping: only this script runs and nothing is ever loaded.
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
    classes = tables.class_table(run, confusion.taken_for() if confusion else {})
    charts = h("div", curves.loss_chart(run), curves.accuracy_chart(run), class_="pair")
    environment = tables.environment_table(run)
    return h(
        "main",
        _header(run),
        _cards(run),
        _notes(run),
        h("section", h("h2", "Training"), charts, curves.lr_chart(run)),
        h("section", h("h2", "Stages"), tables.stage_table(run)),
        _part(
            "Search", "Val top-1 of each head that was tried; the framed one was chosen.", search_maps(run), wide=True
        ),
        h("section", h("h2", "Evaluation"), _evaluation(run)) if run.evaluation else None,
        _part("Classes", "Worst F1 first.", classes),
        _part(
            "Confusion",
            "Share of each true class: right answers in blue, mistakes in orange.",
            [
                heat_map(confusion),
                h("div", h("h3", "Most confused"), pairs) if (pairs := pair_table(confusion)) else None,
            ]
            if confusion
            else None,
            wide=True,
        ),
        _part("Mistakes", "The wrong answers the model was surest of.", tables.mistake_table(run)),
        h("section", h("h2", "Throughput"), curves.throughput_chart(run)),
        h(
            "section",
            h("h2", "How it was run"),
            h("details", h("summary", "Environment"), environment) if environment else None,
            h("details", h("summary", "config.yaml"), h("pre", run.config)) if run.config else None,
            h("p", "Neither env.json nor config.yaml is there.", class_="empty")
            if not environment and not run.config
            else None,
        ),
        _footer(run),
    )


def _part(title: str, hint: str, content: Child, *, wide: bool = False) -> Markup | None:
    if not content:
        return None
    inner = h("div", content, class_="confusion") if wide else content
    return h("section", h("h2", title), h("p", hint, class_="hint"), inner)


def _status(run: Run) -> tuple[str, str, str]:
    """Symbol, word and colour. Without a summary the run is in progress, or ended without a word."""
    status = str(run.summary.get("status") or "running")
    symbol, style = STATES.get(status, ("?", "paused"))
    return symbol, "in progress" if status == "running" else status, style


def _header(run: Run) -> Markup:
    symbol, word, style = _status(run)
    facts = [
        text.moment(run.env.get("start_time")) if run.env.get("start_time") else "",
        f"{len(run.classes):,} class{'es' if len(run.classes) != 1 else ''}" if run.classes else "",
        " \u2192 ".join(band.name for band in run.bands),
        str(run.env.get("device") or ""),
        str(run.env.get("host") or ""),
    ]
    pill = h("span", h("span", symbol, aria_hidden="true"), " ", word, class_=f"pill {style}")
    return h(
        "header",
        h("div", h("h1", run.name), pill, class_="name"),
        h("p", " \u00b7 ".join(fact for fact in facts if fact), class_="facts"),
    )


def _total_seconds(run: Run) -> tuple[float | None, str]:
    told = number(run.summary.get("total_seconds"))
    if told is not None:
        return told, ""
    times = [m.time for m in run.metrics if m.time is not None]
    return (max(times) - min(times), "first to last metric") if len(times) > 1 else (None, "")


def _speed(run: Run) -> tuple[float | None, str]:
    """The last stage that read images: cached features are another order of magnitude."""
    stages = section(run.summary, "stages")
    measured = [
        (number(section(stages, name).get("images_per_second")), name)
        for name in stages
        if section(stages, name).get("cached") is not True
    ]
    known = [(speed, name) for speed, name in measured if speed is not None]
    if known:
        return known[-1][0], f"training, {known[-1][1]}"
    lines = [m for m in run.lines("train") if m.images_per_second is not None]
    return (lines[-1].images_per_second, f"training, {lines[-1].stage}") if lines else (None, "")


def _cards(run: Run) -> Markup:
    best, test = run.best, section(run.summary, "test")
    seconds, how = _total_seconds(run)
    speed, where = _speed(run)
    at = f"val, {best.stage}" + (f" epoch {best.epoch}" if best.epoch is not None else "") if best else ""
    world = number(run.summary.get("world_size"))
    world = number(run.env.get("world_size")) if world is None else world
    memory = number(run.summary.get("peak_memory_mb"))
    test_top1 = number(test.get("top1"))
    cards: list[tuple[str, str, str]] = [("Best top-1", text.percent(best.top1 if best else None), at)]
    cards.append(("Macro F1", text.percent(best.macro_f1 if best else None), at))
    if test_top1 is not None:
        f1 = number(test.get("macro_f1"))
        cards.append(("Test top-1", text.percent(test_top1), f"macro F1 {text.percent(f1)}" if f1 else "test"))
    cards += [
        ("Total time", text.duration(seconds), how),
        ("Images/s", text.rate(speed), where),
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
        notes.append("No metrics yet: the run has not finished its first interval.")
    elif not run.summary:
        notes.append("No summary.json: the run is in progress or was killed; figures are from metrics.jsonl.")
    for key in ("error", "reason", "message"):
        if isinstance(run.summary.get(key), str):
            notes.append(str(run.summary[key]))
    return h("ul", [h("li", note) for note in notes], class_="notes") if notes else None


def _evaluation(run: Run) -> Markup:
    told = run.evaluation
    figures = [
        ("Split", str(told.get("split") or text.NOTHING)),
        ("Images", text.count(number(told.get("n")))),
        ("Top-1", text.percent(number(told.get("top1")))),
        ("Top-5", text.percent(number(told.get("top5")))),
        ("Macro F1", text.percent(number(told.get("macro_f1")))),
        ("Loss", text.decimal(number(told.get("loss")))),
    ]
    return h("dl", [h("div", h("dt", k), h("dd", v)) for k, v in figures], class_="line")


def _footer(run: Run) -> Markup:
    now = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    commit = section(run.env, "git").get("commit")
    dirty = " with local changes" if section(run.env, "git").get("dirty") is True else ""
    code = f" \u00b7 code at {commit[:12]}{dirty}" if isinstance(commit, str) and commit else ""
    return h("footer", f"Written by distil-tl report, {now} \u00b7 {len(run.metrics):,} metric lines{code}")
