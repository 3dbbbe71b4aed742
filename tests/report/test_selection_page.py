"""select.html: what it shows is in select.json, also where figures are missing."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from distil_tl.report import text
from distil_tl.report.head_search import head_map
from distil_tl.report.selection import render_selection
from tests.helpers.selection_pages import content


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


@pytest.mark.parametrize("metric", ["loss", "balanced_accuracy"])
def test_a_map_of_heads_is_of_the_metric(metric: str) -> None:
    grid = [(lr, decay) for lr in (0.1, 0.01) for decay in (0.0, 1.0)]
    values = {"loss": (0.5, 1.25, 2.5, 3.5), "balanced_accuracy": (0.9, 0.5, 0.4, 0.25)}[metric]  # the best first
    heads = [{"lr": lr, "weight_decay": decay, metric: v} for (lr, decay), v in zip(grid, values, strict=True)]
    page = str(head_map(heads, grid[0], metric))
    opacities = [float(each) for each in re.findall('fill-opacity="([^"]*)"', page)]
    assert opacities == sorted(opacities, reverse=True)
    assert opacities[0] == 1.0
    shown = "loss 1.250" if metric == "loss" else "balanced accuracy 50.0\u202f%"
    assert f"lr 0.1, weight decay 1: {shown}" in page
    assert f"{text.METRIC_NAMES.get(metric, metric).capitalize()} on val" in page
    many = [{**heads[i % 4], "weight_decay": float(i)} for i in range(80)]
    best = str(head_map(many, grid[0], metric))
    assert best.count("0.500" if metric == "loss" else "90.0\u202f%") == 15
    assert "3.500" not in best


class Texts(HTMLParser):
    """The texts of a page, but for styles, scripts, the command and the labels of axes."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._skipped: list[bool] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br"):
            axis = "tick" in (dict(attrs).get("class") or "").split() and dict(attrs).get("x") != "0"
            self._skipped.append(tag in ("style", "script", "pre", "h1") or (tag == "text" and axis))

    def handle_endtag(self, tag: str) -> None:
        self._skipped.pop()

    def handle_data(self, data: str) -> None:
        if not any(self._skipped):
            self.found.append(data)


def numbers_of(words: str) -> set[str]:
    """All numbers in a text, without signs and thousands separators."""
    found = re.findall(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", words)
    return {each.replace(",", "") for each in found}


def leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from (key, *leaves(value))
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from leaves(value)
    else:
        yield tree


def shown_of(tree: dict[str, Any]) -> set[str]:
    """Every way in which the page may write something that is in select.json."""
    found = {"95", str(len(tree["classes"])), str(len(tree["rows"]))}  # 95 % intervals
    for value in leaves(tree):
        if isinstance(value, str):
            found |= numbers_of(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            ways = [text.percent(value), text.compact(value), text.rate(value), text.count(value), text.tick(value)]
            ways += [text.duration(value), text.percentage_points(value), f"{value:g}", f"{100 * value:.1f}"]
            ways += [text.decimal(value, digits) for digits in (2, 3, 4)]
            found |= {number for way in ways for number in numbers_of(way)}
    return found


@pytest.mark.parametrize("metric", ["top1", "loss"])
def test_every_number_of_the_page_is_in_select_json(metric: str) -> None:
    tree = content() | {"metric": metric}
    page = str(render_selection(tree, "flowers", "flowers/best.yaml"))
    seen = numbers_of(" ".join(Texts(page).found))
    assert len(seen) >= 30
    assert seen - shown_of(tree) == set()
