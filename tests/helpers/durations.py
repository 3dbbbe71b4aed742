"""Recorded durations of tests: the longest start first, and `--fast` leaves out the slow ones."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

from tests.helpers.paths import ROOT

RECORD = ROOT / "tests/durations.json"  # seconds by test; rewritten by `make durations`
SLOW = 0.5  # seconds from which a test is recorded, and is slow
SERVERS = {"wandb_server": "wandb", "telling_server": "wandb"}


def read_record() -> dict[str, float]:
    record: dict[str, float] = json.loads(RECORD.read_text())
    return record


def group_of(item: pytest.Item) -> str | None:
    """The group of tests that one worker runs one after the other, as they share something that is slow to make."""
    if mark := item.get_closest_marker("xdist_group"):
        return str(mark.kwargs.get("name", mark.args[0] if mark.args else "default"))
    if item.get_closest_marker("slurm"):
        return "slurm"
    assert isinstance(item, pytest.Function)
    for name in item.fixturenames:
        if name in SERVERS:
            return SERVERS[name]
    definitions = item._fixtureinfo.name2fixturedefs
    if any(found[-1].scope == "module" for found in definitions.values()):
        return item.path.stem
    return None


def arrange(items: list[pytest.Item]) -> None:
    """Mark the groups for pytest-xdist, and sort: Slurm's tests first, as they mostly wait, then the longest group."""
    record = read_record()
    groups = {item.nodeid: group_of(item) for item in items}
    totals: dict[str, float] = defaultdict(float)
    for nodeid, group in groups.items():
        totals[group or nodeid] += record.get(nodeid, 0.0)
    for item in items:
        if (group := groups[item.nodeid]) and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(group))

    def key(item: pytest.Item) -> tuple[bool, float, str]:
        name = groups[item.nodeid] or item.nodeid
        return item.get_closest_marker("slurm") is None, -totals[name], name

    items.sort(key=key)


def fast(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Tests to keep and to leave out: one that is slow, and all of its group, as one of them makes what is slow."""
    record = read_record()
    groups = {item.nodeid: group_of(item) for item in items}
    slow = {group for nodeid, group in groups.items() if nodeid in record} - {None}
    parts: tuple[list[pytest.Item], list[pytest.Item]] = [], []
    for item in items:
        group = groups[item.nodeid]
        parts[item.nodeid in record or group in slow or item.get_closest_marker("slurm") is not None].append(item)
    return parts


class Recorder:
    """Writes the record at the end of a run of all tests."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        nodeid, _, group = report.nodeid.rpartition("@")  # pytest-xdist appends @GROUP
        self.seconds[nodeid if nodeid and "]" not in group else report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        slow = {name: round(seconds, 1) for name, seconds in sorted(self.seconds.items()) if seconds >= SLOW}
        RECORD.write_text(json.dumps(slow, indent=0) + "\n")
