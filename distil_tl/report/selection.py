"""select.html: the page of `distil-tl select`, from the content of select.json alone."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from distil_tl.report import text
from distil_tl.report.head_search import head_map, path_table
from distil_tl.report.load import mapping
from distil_tl.report.markup import Child, Markup, h
from distil_tl.report.page import document, section
from distil_tl.report.scatter import Dot, Plane, scatter
from distil_tl.report.svg import Scale, fit_scale
from distil_tl.report.tables import table
from distil_tl.report.text import chosen_by_it, metric_name, number

Content = dict[str, Any]


def render_selection(content: Content, name: str, best_yaml: str) -> Markup:
    """The whole document.

    Args:
        content: of select.json.
        name: of the selection.
        best_yaml: its path.
    """
    return document(f"{name} \u00b7 distil_tl select", _body(content, name, best_yaml))


def _body(content: Content, name: str, best_yaml: str) -> Markup:
    metric, is_map = str(content["metric"]), "lr" in content["best"]
    images = ", ".join(f"{split} {count:,}" for split, count in content["images"].items())
    facts = [f"{len(content['classes'])} classes", images, f"chosen by {metric_name(metric)} on val", content["device"]]
    return h(
        "main",
        h("header", h("div", h("h1", name), class_="name"), h("p", " \u00b7 ".join(facts), class_="facts")),
        _cards(content),
        section(f"{text.capitalized(metric_name(metric))} and cost", _COST, cost_plane(content)),
        section("What sizes, crops, read-outs and heads add", _LESS[metric == "loss"] + _EFFECTS, _effects(content)),
        section("All results", _ROWS, _rows(content)),
        section(
            "Settings of the best head",
            f"{metric_name(metric)} on val. {_MARK[is_map]} was chosen.",
            _heads(content),
            wide=True,
        ),
        section("Pruned by LogME", f"{_PRUNED}{_order(content)}", _pruned(content)),
        section("Not compared", "", _others(content)),
        section("Next", _begins_with(content), h("pre", f"distil-tl train {shlex.quote(best_yaml)}", class_="next")),
        h("footer", "Written by distil-tl select. All numbers are in select.json."),
    )


_COST = (
    "Against billions of multiply-adds for an image. The line joins the cells that no cheaper one reaches; the shaded "
    "band is the 95 % interval of the best, which is outlined."
)
_MARK = {True: "The outlined one", False: "The one with a star"}
_ROWS = (
    "The best first. A star: within the 95 % interval of the best. Of a network with several read-outs or heads the "
    "first one has the time of the features."
)
_LESS = {True: "Differences of the loss (below 0 is better)", False: "Differences, in points,"}
_EFFECTS = (
    " to the first size, crop, read-out or head, everything else equal; the mean, the lowest and the highest. They are "
    "of val, and of single heads: small differences are noise on a few hundred images."
)

_PRUNED = (
    "How well a linear model on features of some images of train explains their labels, without training one. It is "
    "cheap and rough: it is often wrong about backbones of similar scores, so the best may be among those pruned."
)


def _shown(metric: str, value: object) -> str:
    return text.figure(metric, number(value))


def _titled(cell: dict[str, Any]) -> str:
    return f"{cell['model']}, {_settings(cell)}{_with_head(cell)}"


def _settings(cell: dict[str, Any]) -> str:
    """Size and crop, and the read-out if it is another than pooled."""
    readout = cell.get("readout", "pooled")
    return f"{cell['image_size']}{text.SPACE}px, {cell['crop_mode']}{'' if readout == 'pooled' else f', {readout}'}"


def _with_head(row: dict[str, Any]) -> str:
    return "" if row.get("head", "linear") == "linear" else f", {row['head']} head"


def _begins_with(content: Content) -> str:
    """What best.yaml begins with, where that is not the best."""
    first, best = mapping(content, "best_yaml"), content["best"]
    keys = ("model", "image_size", "crop_mode", "readout", "head")
    if not first or all(first.get(key) == best.get(key) for key in keys):
        return ""
    cell = f"{first['model']}, {_settings(first)}"
    return f"best.yaml begins with {cell} and a {first['head']} head, as a {best['head']} head is only compared."


def _between(metric: str, row: dict[str, Any]) -> str:
    found = row.get("interval")
    return f"{_shown(metric, found[0])} to {_shown(metric, found[1])}" if found else ""


def _difference(metric: str, value: float) -> str:
    return f"{value:+.3f}".replace("-", "\u2212") if metric == "loss" else text.percentage_points(value)


def _cards(content: Content) -> Markup:
    best, estimate, metric = content["best"], content["estimate"], content["metric"]
    expected = (
        (
            "to expect",
            _shown(metric, estimate["value"]),
            f"{_between(metric, estimate)}, {estimate['n']:,} {estimate['method']}. {_begins_with(content)}".rstrip(
                ". "
            ),
        )
        if estimate
        else ("to expect", text.MISSING, content["no_estimate"] or "")
    )
    near, candidates = content["near_best"], len(content["rows"])
    gmacs, speed = number(best["gmacs"]), number(best["images_per_second"])
    cards = [
        ("best", best["model"], f"{_settings(best)}{_with_head(best)}"),
        expected,
        (
            f"{metric_name(metric)} on val",
            _shown(metric, best[metric]),
            f"{_between(metric, best)}; {chosen_by_it(candidates, metric)}",
        ),
        ("within its interval", f"{near} of {candidates}", "val can't tell these apart"),
        (
            "cost",
            f"{text.decimal(gmacs, 2)} GMACs",
            f"{text.compact(best['parameters'])} parameters, {text.rate(speed)} images/s",
        ),
    ]
    rows = [
        h("div", h("dt", a), h("dd", b, class_="long" if a == "best" else None), h("dd", c, class_="sub"))
        for a, b, c in cards
    ]
    return h("dl", rows, class_="cards")


def cost_plane(content: Content) -> Child:
    """Accuracy against multiply-adds."""
    metric = content["metric"]
    rows = [row for row in content["rows"] if number(row["gmacs"])]
    if not rows:
        return None
    dots = [
        Dot(
            row["gmacs"], row[metric],
            f"{_titled(row)}: {_shown(metric, row[metric])}, {row['gmacs']:.2f} GMACs",
            "c-val" if row["pareto"] else "c-plain",
            ring=row is content["rows"][0],
        )
        for row in reversed(rows)
    ]  # fmt: skip
    front = sorted((row["gmacs"], row[metric]) for row in rows if row["pareto"])
    interval = content["rows"][0]["interval"]
    costs = [row["gmacs"] for row in rows]
    return scatter(
        Plane(
            title=f"{metric_name(metric)} on val",
            describe=f"{len(rows)} rows; the best is {_titled(content['best'])}.",
            dots=dots,
            x=Scale(min(costs) / 1.3, max(costs) * 1.3, log=True),
            y=fit_scale([row[metric] for row in rows], log_from=float("inf")),
            x_name="GMACs for an image",
            label=lambda value: _shown(metric, value),
            line=front,
            band=None if interval is None else (interval[0], interval[1]),
            legend=[("c-val", "no cheaper one is as good"), ("c-plain", "others")],
        )
    )


def _rows(content: Content) -> Markup:
    metric = content["metric"]
    head = [
        "Backbone", "Size, crop", f"{metric_name(metric)} on val, 95 %", "Parameters, GMACs", "Images/s", "Head",
        "Time",
    ]  # fmt: skip
    star = h("span", "*", class_="tag", title="within the interval of the best")
    lines: list[Sequence[Child]] = [
        [
            [row["model"], star if row["near_best"] else None],
            h("span", _settings(row), class_="narrow"),
            [_shown(metric, row[metric]), h("div", _between(metric, row), class_="below")],
            f"{text.compact(number(row['parameters']))}, {text.decimal(number(row['gmacs']), 2)}",
            text.rate(number(row["images_per_second"])),
            h("span", f"{row.get('head', 'linear')} {text.settings_of(row)}".rstrip(), class_="narrow"),
            text.duration(number(row["seconds"])),
        ]
        for row in content["rows"]
    ]  # fmt: skip
    return table(head, lines, label="All results")


def _effects(content: Content) -> Child:
    rows: list[Sequence[Child]] = [
        [
            f"{effect['value']}{' px' if effect['key'] == 'image_size' else ''}", f"{effect['compared_with']}",
            text.count(effect["pairs"]),
            *(_difference(content["metric"], effect[name]) for name in ("mean", "lowest", "highest")),
        ]
        for effect in content["effects"]
    ]  # fmt: skip
    head = ["Size, crop, read-out or head", "Compared with", "Pairs", "Mean", "Lowest", "Highest"]
    return table(head, rows, texts=2, label="What sizes, crops, read-outs and heads add") if rows else None


def _heads(content: Content) -> Child:
    best = content["rows"][0]
    if len(best["heads"]) < 2:
        return None
    if "lr" not in best:
        return path_table(best["heads"], best, content["metric"])
    return h("div", head_map(best["heads"], (best["lr"], best["weight_decay"]), content["metric"]))


def _pruned(content: Content) -> Child:
    pruning = content["pruning"]
    if pruning is None:
        return None
    rows: list[Sequence[Child]] = [
        [score["model"], f"{score['image_size']}{text.SPACE}px", f"{score['logme']:.4f}", text.count(score["images"]),
         "searched" if score["kept"] else "pruned"]
        for score in pruning["scores"]
    ]  # fmt: skip
    return table(["Backbone", "Size", "LogME", "Images", "Outcome"], rows, label="Pruned by LogME", texts=2)


def _order(content: Content) -> str:
    """How often val agrees with LogME."""
    pruning = content["pruning"]
    if pruning is None or not pruning["pairs"]:
        return ""
    return f" Val has {pruning['same_order']} of {pruning['pairs']} pairs of searched backbones in the same order."


def _others(content: Content) -> Child:
    missing, left_out, left = mapping(content, "missing_weights"), mapping(content, "left_out"), content["not_tried"]
    rows: list[Sequence[Child]] = [[name, f"weights not on this machine: {source}"] for name, source in missing.items()]
    rows += [[name, reason] for name, reason in left_out.items()]
    rows += [[_titled(cell), "not tried, for lack of time"] for cell in left]
    return table(["Backbone", "Why"], rows, texts=2, label="Not compared") if rows else None
