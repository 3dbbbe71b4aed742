"""Show the status of runs: `python -m launch.status DIR [--watch [SECONDS]] [--json]`.

DIR is a run, a sweep, or a folder with runs. The status is read from the run directories and, where Slurm answers, from
squeue. It needs neither Slurm's accounting nor the shell that submitted the runs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from time import sleep
from typing import Any

from distil_tl.rundir.lock import FILE as ATTEMPT_FILE
from distil_tl.utils.command import run_command
from distil_tl.utils.data_wait import is_notable
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import json_safe
from distil_tl.utils.home import path_argument
from distil_tl.utils.intervals import plus_minus
from distil_tl.utils.log import printable, setup_console, table
from launch.args import seconds
from launch.evidence import ask_slurm
from launch.failure import explain_failures
from launch.records import RECORD_FILE, read_sweep_record
from launch.run_status import STATES, RunStatus, get_number, loss_of, metric_of, read_status
from launch.sweep_file import Values

ENDED = ("completed", "failed", "stopped", "pruned")
WAITING = ("pending", "requeued")
DEFAULT_METRIC = "top1"


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m launch.status", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "dir", type=path_argument, help="a run directory, the folder of a sweep, or any folder with runs in it"
    )
    parser.add_argument(
        "--watch",
        type=seconds,
        nargs="?",
        const=10.0,
        metavar="SECONDS",
        help="repeat every SECONDS (default: 10) until all runs have ended",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for other programs")
    options = parser.parse_args(args)
    return run_command("launch.status", lambda: status(options.dir, watch=options.watch, as_json=options.json))


@dataclass(frozen=True)
class Overview:
    """The status of all runs in a folder.

    Attributes:
        rows: runs with the values that their trials set, best first; of several data sets, by data set.
        note: why Slurm's queue could not be read.
        earlier: trials that are no longer in the sweep.
    """

    folder: Path
    metric: str
    rows: list[tuple[RunStatus, Values]]
    note: str | None
    earlier: frozenset[Path] = frozenset()

    @property
    def all_ended(self) -> bool:
        return all(run.state in ENDED for run, _ in self.rows)


def status(folder: Path, *, watch: float | None = None, as_json: bool = False) -> None:
    """Print the status of all runs in `folder`; with `watch`, every so many seconds until all have ended.

    Raises:
        UserError: the folder contains no run.
    """
    setup_console(True)
    with suppress(KeyboardInterrupt):  # ends --watch
        while True:
            overview = read_overview(folder.absolute())
            text = to_json(overview) if as_json else to_text(overview)
            if watch is not None and sys.stdout.isatty():
                sys.stdout.write("\x1b[H\x1b[2J")  # clears the terminal
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
            if watch is None or overview.all_ended:
                return
            sleep(max(watch, 0.1))


def read_overview(folder: Path) -> Overview:
    """The status of all runs in `folder`.

    Raises:
        UserError: the folder does not exist or contains no run.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a run directory, or a folder with runs in it")
    sweep = read_sweep_record(folder)
    earlier: dict[str, Values] = {}
    if sweep is not None:
        earlier = sweep.get("earlier", {})
        values = {folder / name: trial for name, trial in {**earlier, **sweep["trials"]}.items()}
    else:
        values = {run_dir: {} for run_dir in find_runs(folder)}
    metrics = {metric_of(run_dir) for run_dir in values} if sweep is None else {sweep.get("metric", DEFAULT_METRIC)}
    metric = metrics.pop() if len(metrics) == 1 else DEFAULT_METRIC
    if not values:
        raise UserError(f"{folder} contains no run; a run directory has {ATTEMPT_FILE} or {RECORD_FILE}")
    queue, why = ask_slurm(values)
    note = f"{why}; the states of jobs are read from their files only" if why is not None else None
    statuses = explain_failures([read_status(run_dir, queue) for run_dir in values])
    statuses = [replace(run, data=run.data or values[run.run_dir].get("data.root")) for run in statuses]
    several = len({run.data for run in statuses if run.data is not None}) > 1
    rows = list(zip(statuses, values.values(), strict=True))
    rows.sort(key=lambda row: (*_rank(row[0], metric), STATES.index(row[0].state), row[0].run_dir.name))
    if several:  # figures of different images can't be compared
        rows.sort(key=lambda row: (row[0].data is None, row[0].data))
    return Overview(folder, metric, rows, note, frozenset(folder / name for name in earlier))


def find_runs(folder: Path) -> list[Path]:
    """The run directories in `folder`: `folder` itself, or all up to three levels below."""
    if is_run(folder):
        return [folder]
    runs = []
    for depth in range(1, 4):
        runs += [path for path in folder.glob("/".join("*" * depth)) if path.is_dir() and is_run(path)]
    return sorted(runs)


def is_run(folder: Path) -> bool:
    return (folder / ATTEMPT_FILE).exists() or (folder / RECORD_FILE).exists()


def _rank(run: RunStatus, metric: str) -> tuple[float, float]:
    """A sort key: the metric, then the loss; smaller is better."""
    best = run.best or {}
    value = get_number(best, metric)
    if value is None:
        return math.inf, math.inf
    return (value if metric == "loss" else -value), loss_of(best)


def to_text(overview: Overview) -> str:
    """A table with a row for each run, without empty columns, and a summary below; a table for each data set."""
    groups = [list(rows) for _, rows in groupby(overview.rows, key=lambda row: row[0].data)]
    if len({rows[0][0].data for rows in groups} - {None}) < 2:
        groups = [overview.rows]
    text = []
    for rows in groups:
        if len(groups) > 1:
            text.append(f"data: {printable(rows[0][0].data or 'not known yet')}")
        text.append(_table(overview, rows))
    counts = Counter(run.state for run, _ in overview.rows)
    text.append(", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]))
    for run, _ in overview.rows:
        if run.detail and run.state in ("failed", "unknown"):
            text.append(f"{printable(run.run_dir.name)}: {printable(run.detail)}")
        if run.log is not None:
            text.append(f"  output: {printable(run.log)}")
    if overview.earlier:
        text.append(f"no longer in the sweep: {', '.join(sorted(path.name for path in overview.earlier))}")
    if overview.note:
        text.append(overview.note)
    return "\n".join(text)


def _table(overview: Overview, runs: Sequence[tuple[RunStatus, Values]]) -> str:
    keys = list(dict.fromkeys(key for _, values in runs for key in values))
    short = _short_names(keys)
    head = ["", "run", "state", "done", overview.metric, *(short[key] for key in keys)]
    head += ["at", "data wait", "job", "restarts", "left", "training", "where"]
    rows = [_cells(overview, rank, run, [values.get(key) for key in keys])
            for rank, (run, values) in enumerate(runs, start=1)]  # fmt: skip
    used = [i for i in range(len(head)) if i < 5 or any(row[i] for row in rows)]
    return table([[row[i] for i in used] for row in rows], [head[i] for i in used])


def _cells(overview: Overview, rank: int, run: RunStatus, values: Sequence[Any]) -> list[str]:
    """A row of the table."""
    metric = get_number(run.best or {}, overview.metric)
    is_folder = run.run_dir == overview.folder
    name = run.run_dir.name if is_folder else str(run.run_dir.relative_to(overview.folder))
    reason = f"({run.detail})" if run.state in WAITING and run.detail else ""
    return [
        str(rank) if metric is not None else "",
        printable(name),
        run.state,
        f"{100 * run.progress:.0f}%" if run.progress is not None else "",
        plus_minus(metric, run.intervals.get(overview.metric)) if metric is not None else "",
        *("" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value) for value in values),
        f"{run.stage} {run.epoch}" if run.stage else "",
        f"{run.data_wait:.0%}" if run.data_wait is not None and is_notable(run.data_wait) else "",
        run.job_id or "",
        str(run.restarts or ""),
        run.left or "",
        run.remaining or "",
        printable(run.host or reason),
    ]


def to_json(overview: Overview) -> str:
    """The same for other programs."""
    runs = [
        {
            **asdict(run),
            "run_dir": str(run.run_dir),
            "log": str(run.log) if run.log is not None else None,
            "values": values,
            "earlier": run.run_dir in overview.earlier,
        }
        for run, values in overview.rows
    ]
    content: Mapping[str, Any] = {
        "folder": str(overview.folder),
        "metric": overview.metric,
        "note": overview.note,
        "runs": runs,
    }
    return json.dumps(json_safe(content), indent=2)


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """The shortest endings of dotted keys that are distinct."""
    short = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        short[key] = next(e for e in endings if sum(k == e or k.endswith(f".{e}") for k in keys) == 1 or e == key)
    return short


if __name__ == "__main__":
    sys.exit(main())
