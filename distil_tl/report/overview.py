"""The top of the page: what the run is, its figures, settings and notes; and what to do next."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

from distil_tl.report import figures, tables, text
from distil_tl.report.confusion import Confusion
from distil_tl.report.load import Run, mapping
from distil_tl.report.markup import Markup, h
from distil_tl.report.text import number
from distil_tl.utils import intervals
from distil_tl.utils.data_wait import is_notable

STATES = {
    "completed": ("\u2713", "good"),
    "preempted": ("\u25ae\u25ae", "paused"),
    "failed": ("\u2715", "bad"),
    "running": ("\u25cf", "live"),
}


def _status(run: Run) -> tuple[str, str, str]:
    """Symbol, status and colour. Without a summary the run is in progress or was killed; both show as in progress."""
    status = str(run.summary.get("status") or "running")
    symbol, style = STATES.get(status, ("?", "paused"))
    return symbol, "in progress" if status == "running" else status, style


def header(run: Run) -> Markup:
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


def cards(run: Run, confusion: Confusion | None) -> Markup:
    best, test = run.best, mapping(run.summary, "test")
    seconds, seconds_hint = _total_seconds(run)
    speed, speed_hint = _speed(run)
    when = f"val, {best.stage}" + (f" epoch {best.epoch}" if best.epoch is not None else "") if best else ""
    alpha = number(mapping(run.summary, "best").get("alpha"))
    when += f", alpha {alpha:g}" if alpha is not None else ""
    when += ", kept at the end" if best and "instead_of" in mapping(run.summary, "best") else ""
    world = number(run.summary.get("world_size"))
    world = number(run.env.get("world_size")) if world is None else world
    memory = number(run.summary.get("peak_memory_mb"))
    test_top1 = number(test.get("top1"))
    shown: list[tuple[str, str, str]] = [("Best top-1", text.percent(best.top1 if best else None), when)]
    chosen = number(mapping(run.summary, "best").get(run.metric))
    if run.metric in ("balanced_accuracy", "top5") and chosen is not None:
        name = "Balanced accuracy" if run.metric == "balanced_accuracy" else "Top-5"
        shown.append((name, text.percent(chosen), "chose the best epoch"))
    n, top1 = number(run.evaluation.get("n")), best.top1 if best else None
    if n and top1 is not None and (interval := figures.between(intervals.wilson(top1 * n, n))):
        shown[0] = (*shown[0][:2], f"{interval}, {when}")
    # While a run is trained further, the evaluation is that of an earlier checkpoint.
    same = best is not None and run.evaluation.get("top1") == best.top1
    f1 = figures.between(intervals.bootstrap(confusion.rows).get("macro_f1")) if confusion and same else ""
    shown.append(("Macro F1", text.percent(best.macro_f1 if best else None), ", ".join(filter(None, (f1, when)))))
    if test_top1 is not None:
        size, test_f1 = number(run.test.get("n")), number(test.get("macro_f1"))
        facts = [figures.between(intervals.wilson(test_top1 * size, size)) if size else ""]
        facts.append(f"macro F1 {text.percent(test_f1)}" if test_f1 else "")
        shown.append(("Test top-1", text.percent(test_top1), ", ".join(filter(None, facts)) or "test"))
    shown += [
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
        [h("div", h("dt", k), h("dd", v), h("dd", hint, class_="sub")) for k, v, hint in shown],
        class_="cards",
    )


def notes(run: Run) -> Markup | None:
    found = list(run.notes)
    if not run.metrics:
        found.append("No metrics yet: the run has not completed its first logging interval.")
    elif not run.summary:
        found.append("No summary.json: the run is in progress or was killed. The figures come from metrics.jsonl.")
    for band in run.bands:
        share, cached = (
            tables.data_wait(run, band.name),
            mapping(mapping(run.summary, "stages"), band.name).get("cached"),
        )
        if is_notable(share) and cached is not True:
            found.append(
                f"Stage {band.name} waited for images during {text.percent(share, 0)} of its training. More CPUs for "
                "loader processes, or smaller image files, make it faster."
            )
    found += tables.part_sizes(run) + tables.early_ends(run)
    if overfit := figures.overfitting(run):
        found.append(overfit[1])
    for key in ("error", "reason", "message"):
        if isinstance(run.summary.get(key), str):
            found.append(str(run.summary[key]))
    return h("ul", [h("li", note) for note in found], class_="notes") if found else None


def settings_line(run: Run) -> Markup | None:
    """The settings that matter most, on one line."""
    found = figures.settings(run)
    return h("dl", [h("div", h("dt", k), h("dd", v)) for k, v in found], class_="line settings") if found else None


def evaluation(content: dict[str, Any], confusion: Confusion | None) -> Markup | None:
    """The figures of an evaluation with their 95 % intervals, beside always predicting the largest class."""
    if not content:
        return None
    n, top1 = number(content.get("n")), number(content.get("top1"))
    interval = intervals.wilson(top1 * n, n) if n and top1 is not None else None
    drawn = intervals.bootstrap(confusion.rows) if confusion else {}
    largest = figures.baseline(content)
    classes = len(content["per_class"]) if isinstance(content.get("per_class"), list) else math.inf
    shown: list[tuple[str, Any]] = [
        ("Split", str(content.get("split") or text.MISSING)),
        ("Images", text.count(n)),
        ("Top-1", _with(text.percent(top1), interval)),
        *([("Top-5", text.percent(number(content.get("top5"))))] if classes > 5 else []),
        ("Macro F1", _with(text.percent(number(content.get("macro_f1"))), drawn.get("macro_f1"))),
        ("Loss", text.decimal(number(content.get("loss")))),
    ]
    if (balanced := number(content.get("balanced_accuracy"))) is not None:
        shown.insert(-1, ("Balanced accuracy", _with(text.percent(balanced), drawn.get("balanced_accuracy"))))
    if largest is not None:
        shown.append((f"Always \u201c{largest[0]}\u201d", text.percent(largest[1])))
    return h("dl", [h("div", h("dt", k), h("dd", v)) for k, v in shown], class_="line")


def _with(shown: str, interval: intervals.Interval | None) -> Markup:
    note = h("span", f" ({figures.between(interval)})", class_="interval") if interval else None
    return h("span", shown, note)


def next_commands(run: Run) -> Markup | None:
    """What to do with a completed run; how to resume another one."""
    if not run.summary:
        return None
    saved = str(run.settings.get("run_dir") or run.name)
    folder = run.name if Path(saved).is_absolute() else saved.rstrip("/")
    name = shlex.quote(folder)
    if run.summary.get("status") != "completed":
        return h("p", "Run the same command again to resume this run.")
    commands = [
        f"distil-tl predict {name} FOLDER -o predictions.csv",
        f"distil-tl export {name} -o model.onnx",
    ]
    last = run.bands[-1].name if run.bands else "full"
    if overfit := figures.overfitting(run):
        again = (f"{folder}/config.yaml", f"run_dir={folder}-fewer-epochs", f"stages.{last}.epochs={overfit[0]}")
        commands.append(f"distil-tl train {shlex.join(again)}")
    else:
        commands.append(f"distil-tl extend {name} stages.{last}.epochs=+3")
    if not run.summary.get("test"):
        commands.insert(0, f"distil-tl evaluate {name} --split test data.root=FOLDER")
    return h("pre", "\n".join(commands), class_="next")
