"""The part `stand-ins`: costs of 8 to 256 stand-in ranks, and what follows for thousands."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measure import Results, Spread, log, markdown
from benchmarks.scale import link
from benchmarks.scale.extrapolation import Law, error, fit
from benchmarks.scale.ranks import run_ranks

DELAYS = (10.0, 50.0)  # milliseconds, one way
MOST_DELAYED = 32  # ranks behind the delaying switch, which is a process
# Ranks that gloo connects all at once, and of which one is killed: the machine is too busy with more.
MOST_CONNECTED = 64
SMALL_INDEX = 1000  # files, where the latency is measured
LATENCY, BANDWIDTH = 50e-6, 1.25e9  # of the model: seconds one way, bytes/s
CPU = ("cpu_rank_zero", "cpu_other")


def stand_ins(options: argparse.Namespace, results: Results, work: Path) -> str:
    reason = results.once("no cluster", link.missing)
    network = None if reason else {"mbit": options.node_mbit}
    runs = {n: _repeated(options, results, work, n, network=network, files=options.index) for n in options.stand_ins}
    text = measured(runs, reason)
    if reason:
        return text
    delayed: dict[float, dict[int, list[dict[str, Any]]]] = {}
    for delay in DELAYS:
        few = [n for n in options.stand_ins if n <= MOST_DELAYED]
        task: dict[str, Any] = {"network": {"delay_ms": delay}, "files": SMALL_INDEX}
        delayed[delay] = {n: _repeated(options, results, work, n, **task) for n in few}
    few = [n for n in options.stand_ins if n <= MOST_CONNECTED]
    mesh = {n: _repeated(options, results, work, n, network=network, files=SMALL_INDEX, lazy=False) for n in few}
    lost = {n: _repeated(options, results, work, n, network=network, lost=True) for n in few}
    return "\n".join([
        text,
        "**All ranks connected at once**, as gloo does unless `TORCH_GLOO_LAZY_INIT=1`:\n\n"
        + markdown(["ranks", "s", "CPU s of rank 0", "CPU s of another rank", "KB sent", "descriptors"], _mesh(mesh)),
        "**A killed rank**: seconds from its end to that of the last other rank, all with status 1:\n\n"
        + markdown(["ranks", "s"], [[n, Spread.of([run["end_seconds"] for run in lost[n]]).text(1)] for n in lost]),
        modelled(runs, delayed, options.modelled),
    ])  # fmt: skip


def _mesh(runs: dict[int, list[dict[str, Any]]]) -> list[list[Any]]:
    rows = []
    for n, of_n in runs.items():
        parts = [run["parts"]["gloo group"] for run in of_n]
        cells = [
            Spread.of([part[key] / scale for part in parts]).text(digits)
            for key, scale, digits in (("seconds", 1, 1), (CPU[0], 1, 2), (CPU[1], 1, 2), ("sent", 1000, 0))
        ]
        rows.append([n, *cells, max(run["descriptors"] for run in of_n)])
    return rows


def _repeated(
    options: argparse.Namespace, results: Results, work: Path, ranks: int, **task: Any
) -> list[dict[str, Any]]:
    name = f"{ranks} stand-ins {sorted(task.items())}"

    def measure() -> Any:
        log(name)
        task["ranks"], task["per_node"] = ranks, options.per_node
        return [_once(task, work) for _ in range(options.repeats)]

    found: list[dict[str, Any]] = results.once(name, measure)
    return found


def _once(task: dict[str, Any], work: Path) -> dict[str, Any]:
    """Start the ranks. The nodes are made here, so that they are removed however the ranks end."""
    nodes, shape = -(-task["ranks"] // task["per_node"]), task.get("network")
    network: AbstractContextManager[link.Cluster | None] = (
        nullcontext() if shape is None else link.cluster(nodes, **shape)
    )
    with network as made:
        task = {**task, "cluster": None if made is None else asdict(made)}
        found: dict[str, Any] = run_ranks(
            1, "benchmarks.scale.stand_ins", task, work, OMP_NUM_THREADS="1", TMPDIR=str(work)
        )[0]
    return found


def measured(runs: dict[int, list[dict[str, Any]]], reason: str | None) -> str:
    """Tables of what was measured."""
    totals = {
        "s until the group is formed": ("formed_seconds", 1), "s from the signal to the stop": ("stop_seconds", 2),
        "s until the last one has exited": ("leave_seconds", 1), "s from start to the last exit": ("seconds", 1),
        "CPU s, all processes": ("cpu_seconds", 0),
        "MiB of a rank": ("private_mb", 0), "MiB of its watchdog": ("watchdog_mb", 0),
        "descriptors of a rank, at most": ("descriptors", 0),
    }  # fmt: skip
    rows = [
        [label, *(Spread.of([run[key] for run in runs[n]]).text(digits) for n in runs)]
        for label, (key, digits) in totals.items()
    ]
    header = [f"{n} ranks" for n in runs]
    where = f"on the loopback interface, as {reason}" if reason else "each node in a network namespace"
    text = [f"**Stand-in ranks**, {where}:\n\n{markdown(['', *header], rows)}"]
    columns = {
        "requests to the store": ("requests", 0), "seconds, of all ranks": ("seconds", 2),
        "CPU seconds of rank 0": ("cpu_rank_zero", 3), "CPU seconds of another rank": ("cpu_other", 3),
        "KB sent by the node of rank 0": ("sent", 0),
    }  # fmt: skip
    for label, (key, digits) in columns.items():
        scale = 1000 if key == "sent" else 1
        rows = [
            [part, *(Spread.of([run["parts"][part][key] / scale for run in runs[n]]).text(digits) for n in runs)]
            for part in _parts(runs)
        ]
        text.append(f"**{label[0].upper()}{label[1:]}**:\n\n{markdown(['', *header], rows)}")
    return "\n".join(text)


def _parts(runs: dict[int, list[dict[str, Any]]]) -> list[str]:
    return list(next(iter(runs.values()))[0]["parts"])


def values(runs: dict[int, list[dict[str, Any]]], part: str, key: str) -> dict[int, float]:
    """The median by number of ranks."""
    return {n: Spread.of([run["parts"][part][key] for run in of_n]).median for n, of_n in runs.items()}


def checked_law(found: dict[int, float]) -> tuple[Law, float | None]:
    """A law fitted to all sizes but the largest, and its relative error there; None with too few sizes."""
    sizes = sorted(found)
    if len(sizes) < 4:
        return fit(sizes, [found[n] for n in sizes]), None
    law = fit(sizes[:-1], [found[n] for n in sizes[:-1]])
    return law, error(law, sizes[-1], found[sizes[-1]])


def trips(delayed: dict[float, dict[int, list[dict[str, Any]]]], part: str) -> dict[int, float]:
    """By number of ranks how often the slowest rank waits for one way through the network."""
    low, high = min(delayed), max(delayed)
    few, more = values(delayed[low], part, "seconds"), values(delayed[high], part, "seconds")
    return {n: max(0.0, (more[n] - few[n]) / (high - low) * 1000) for n in few}


def modelled(
    runs: dict[int, list[dict[str, Any]]], delayed: dict[float, dict[int, list[dict[str, Any]]]], ranks: int
) -> str:
    """The table for many ranks: laws of requests, bytes, CPU seconds and trips, and the seconds that follow."""
    rows = []
    for part in _parts(runs):
        cells, seconds = [], 0.0
        for key in ("requests", "sent", *CPU):
            law, wrong = checked_law(values(runs, part, key))
            value = law(ranks)
            digits = 1 if key in CPU else 0
            shown = f"{value / 1e6:,.1f}" if key == "sent" else f"{value:,.{digits}f}"
            cells.append(shown + ("" if wrong is None or value == 0 else f" ({wrong:+.0%})"))
            seconds += value / BANDWIDTH if key == "sent" else value if key in CPU else 0.0
        law, _ = checked_law(trips(delayed, part))
        seconds += law(ranks) * LATENCY
        rows.append([part, *cells, f"{law(ranks):,.0f}", f"{seconds:,.1f}"])
    header = ["", "requests", "MB of node 0", "CPU s of rank 0", "CPU s of another rank", "one-way trips", "s"]
    return (
        f"**{ranks:,} ranks, modelled**. In brackets the error of the same law, fitted without the largest size, at "
        f"that size:\n\n{markdown(header, rows)}"
    )
