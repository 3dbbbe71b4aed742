"""The page: its sections from top to bottom."""

from __future__ import annotations

import base64
import hashlib
from datetime import datetime, timezone
from pathlib import Path

from distil_tl.report import curves, images, overview, reliability, tables
from distil_tl.report.confusion import MAX_DRAWN, Confusion, heat_map, pair_table, read_confusion
from distil_tl.report.head_search import fit_tables, search_maps
from distil_tl.report.load import Run, mapping
from distil_tl.report.markup import Child, Markup, h, join


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text("utf-8")


def render(run: Run) -> Markup:
    """The whole document."""
    return document(f"{run.name} \u00b7 distil_tl", _body(run))


def document(title: str, body: Markup) -> Markup:
    """A self-contained page around its `main` element."""
    style, script = _asset("style.css"), _asset("hover.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Defence in depth, besides the escaping: only this script may run, and nothing may be loaded.
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", http_equiv="Content-Security-Policy", content=policy),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("meta", name="color-scheme", content="light dark"),
        h("title", title),
        h("style", Markup(style)),
    )
    return join(
        Markup("<!doctype html>\n"),
        h("html", head, h("body", body, h("script", Markup(script))), lang="en"),
        Markup("\n"),
    )


def _body(run: Run) -> Markup:
    confusion = read_confusion(run)
    classes = tables.class_table(run, run.evaluation, confusion.confused_with() if confusion else {})
    charts = h("div", curves.loss_chart(run), curves.accuracy_chart(run), class_="pair")
    uncertain = images.uncertain_table(run)
    is_large = confusion is not None and len(confusion.rows) > MAX_DRAWN
    return h(
        "main",
        overview.header(run),
        overview.cards(run, confusion),
        overview.settings_line(run),
        overview.notes(run),
        h("section", h("h2", "Training"), charts, curves.lr_chart(run)),
        section("Training images", "As augmented, some of each stage.", images.sample_strips(run)),
        h("section", h("h2", "Stages"), tables.stage_table(run)),
        section(
            "Head search", "Val top-1 of each candidate head. The outlined one was chosen.", search_maps(run), wide=True
        ),
        section("Fitted heads", "On val, by setting. The one with a star was chosen.", fit_tables(run)),
        section(
            "Interpolated weights",
            "Between the first weights of a stage (alpha 0) and those of its last or best epoch (alpha 1).",
            tables.interpolation_tables(run),
        ),
        section(
            "Average of checkpoints", "Each was added if it made the average better on val.", tables.soup_table(run)
        ),
        section("Evaluation", "The best checkpoint on val.", overview.evaluation(run.evaluation, confusion)),
        section("Classes", "On val, sorted by F1, lowest first.", classes),
        section("Test", "The best checkpoint on test, class by class.", _test(run)),
        section(
            "Calibration",
            "How often predictions are right, compared with their probability, the confidence.",
            reliability.calibration(run),
        ),
        section(
            "Confusion matrix",
            "Rows are true classes. Correct predictions are blue, wrong ones orange, by share of the row."
            + (f" Drawn are the {MAX_DRAWN} classes with the most mistakes." if is_large else ""),
            [heat_map(confusion), _most_confused(confusion)] if confusion else None,
            wide=True,
        ),
        section("Mistakes", "The most confident wrong predictions.", images.mistake_table(run)),
        section("Least certain", "The two most probable classes are close, right or wrong.", uncertain),
        h(
            "section",
            h("h2", "Throughput"),
            curves.throughput_chart(run),
            tables.data_waits(run),
            tables.peak_memory(run),
        ),
        _environment(run),
        section("Next", "", overview.next_commands(run)),
        _footer(run),
    )


def _environment(run: Run) -> Markup:
    environment = tables.environment_table(run)
    return h(
        "section",
        h("h2", "Environment and configuration"),
        h("details", h("summary", "Environment"), environment) if environment else None,
        h("details", h("summary", "config.yaml"), h("pre", run.config)) if run.config else None,
        h("p", "The run directory has no env.json and no config.yaml.", class_="empty")
        if not environment and not run.config
        else None,
    )


def _test(run: Run) -> Child:
    classes = tables.class_table(run, run.test, {})
    figures = overview.evaluation(run.test, read_confusion(run, run.test))
    return [figures, h("details", h("summary", "Classes"), classes)] if classes else None


def _most_confused(confusion: Confusion) -> Markup | None:
    pairs = pair_table(confusion)
    return h("div", h("h3", "Most confused pairs"), pairs) if pairs else None


def section(title: str, hint: str, content: Child, *, wide: bool = False) -> Markup | None:
    """A section with its heading; None without content."""
    if not content:
        return None
    inner = h("div", content, class_="confusion") if wide else content
    return h("section", h("h2", title), h("p", hint, class_="hint") if hint else None, inner)


def _footer(run: Run) -> Markup:
    now = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    commit = mapping(run.env, "git").get("commit")
    dirty = " with local changes" if mapping(run.env, "git").get("dirty") is True else ""
    code = f" \u00b7 commit {commit[:12]}{dirty}" if isinstance(commit, str) and commit else ""
    return h("footer", f"Written by distil-tl report, {now} \u00b7 {len(run.metrics):,} lines of metrics{code}")
