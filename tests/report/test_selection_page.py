"""select.html: what it shows is in select.json, also where figures are missing."""

from __future__ import annotations

import copy
from typing import Any

from distil_tl.report.selection import render_selection


def row(name: str, top1: float, gmacs: float | None, **more: Any) -> dict[str, Any]:
    heads = [{"lr": lr, "weight_decay": 0.1, "top1": top1 - lr, "loss": 1.0} for lr in (0.0, 0.01)]
    return {
        "model": name, "image_size": 64, "crop_mode": "weights", "parameters": 1_234_567, "gmacs": gmacs,
        "weights": "none", "features": 8, "precision": "fp32", "n": 100, "lr": 0.01, "weight_decay": 0.1, "top1": top1,
        "loss": 1.0, "interval": (top1 - 0.1, top1 + 0.05), "near_best": top1 > 0.7, "pareto": gmacs is not None,
        "images_per_second": 321.0, "seconds": 12.0, "heads": heads, **more,
    }  # fmt: skip


def content() -> dict[str, Any]:
    rows = [row("timm/<best>", 0.8, 2.0), row("second", 0.75, 0.5), row("uncounted", 0.4, None)]
    estimate = {"split": "test", "method": "images of test", "n": 50, "value": 0.77, "interval": (0.64, 0.86)}
    effect = {"key": "crop_mode", "value": "squash", "compared_with": "weights", "pairs": 3, "mean": 0.021}
    return {
        "metric": "top1", "classes": ["a", "b"], "images": {"train": 400, "val": 100, "test": 50}, "best": rows[0],
        "estimate": estimate, "no_estimate": None, "near_best": 2, "rows": rows, "device": "cpu", "ranks": 1,
        "effects": [{**effect, "lowest": -0.01, "highest": 0.05}], "seconds": 60.0, "budget_seconds": None,
        "not_tried": [{"model": "late", "image_size": 96, "crop_mode": "squash", "parameters": 1, "gmacs": 9.0}],
        "pruning": None, "left_out": {"odd 64 px": "it can't be cut"}, "missing_weights": {"far": "timm far.tag"},
    }  # fmt: skip


def test_the_page_shows_the_result_its_costs_and_what_was_left_out() -> None:
    page = str(render_selection(content(), "select-flowers", "runs/select flowers/best.yaml"))
    for shown in (
        "timm/&lt;best&gt;", "77.0\u202f%", "64.0\u202f% to 86.0\u202f%", "2 of 3", "2.00 GMACs", "1.23\u202fM", "+2.1",
        "late, 96\u202fpx, squash", "it can&#x27;t be cut", "timm far.tag", "&#x27;runs/select flowers/best.yaml&#x27;",
        "321", "50 images of test",
    ):  # fmt: skip
        assert shown in page, shown
    assert page.count("<circle") == 3, "two points, and a ring around the best"
    assert "<best>" not in page


def test_a_metric_without_interval_and_no_estimate() -> None:
    tree = copy.deepcopy(content()) | {"metric": "loss", "estimate": None, "no_estimate": "too few images"}
    for each in tree["rows"]:
        each["interval"] = None
    tree["best"] = tree["rows"][0]
    page = str(render_selection(tree, "x", "x/best.yaml"))
    assert "too few images" in page
    assert "1.000" in page
    assert "None" not in page
