"""How runs stand: `python -m launch.status DIR [--watch [SECONDS]] [--json]`, for a run, a sweep, or a folder of runs.

From the run directories, and from squeue where it answers; neither accounting nor the submitting shell is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import sleep
from typing import Any

from distil_tl.rundir.lock import FILE as ATTEMPT
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import json_safe
from distil_tl.utils.log import printable, setup_console, table
from launch.records import RECORD, read_sweep_record
from launch.run_status import STATES, Standing, loss_of, number, stand
from launch.squeue import QueuedJob, SlurmUnavailableError, queued
from launch.sweep_file import Values

OVER = ("completed", "failed", "stopped", "pruned")
WAITS = ("pending", "requeued")
DEFAULT_METRIC = "top1"


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m launch.status", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dir", type=Path, help="a run directory, a sweep's, or any folder above some")
    parser.add_argument(
        "--watch", type=float, nargs="?", const=10.0, metavar="SECONDS", help="again and again, every 10"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    known = parser.parse_args(args)
    return run_command("launch.status", lambda: status(known.dir, watch=known.watch, as_json=known.json))


@dataclass(frozen=True)
class Overview:
    folder: Path
    metric: str
    rows: list[tuple[Standing, Values]]
    note: str | None  # when Slurm could not be asked
    earlier: frozenset[Path] = frozenset()  # trials that are no longer in the sweep

    @property
    def over(self) -> bool:
        return all(standing.state in OVER for standing, _ in self.rows)


def status(folder: Path, *, watch: float | None = None, as_json: bool = False) -> None:
    """Print how everything in `folder` stands, with `watch` until all of it is over.

    Raises:
        UserError: there is no run.
    """
    setup_console(True)
    with suppress(KeyboardInterrupt):  # the way to leave --watch
        while True:
            found = overview(folder.absolute())
            text = to_json(found) if as_json else to_text(found)
            if watch is not None and sys.stdout.isatty():
                sys.stdout.write("\x1b[H\x1b[2J")
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
            if watch is None or found.over:
                return
            sleep(max(watch, 0.1))


def overview(folder: Path) -> Overview:
    """All runs in `folder`, best first."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give a run directory, or one above some")
    sweep = read_sweep_record(folder)
    earlier: dict[str, Values] = {}
    if sweep is not None:
        earlier = sweep.get("earlier", {})
        values = {folder / name: given for name, given in {**earlier, **sweep["trials"]}.items()}
    else:
        values = {run_dir: {} for run_dir in find_runs(folder)}
    metric = (sweep or {}).get("metric", DEFAULT_METRIC)
    if not values:
        raise UserError(f"{folder} holds no run; a run directory has {ATTEMPT} or {RECORD}")
    queue: dict[str, QueuedJob] | None = None
    note = None
    try:
        queue = queued(folder.stat().st_uid)  # who may be a colleague
    except SlurmUnavailableError as error:
        note = f"{error}: jobs are judged by their files"
    rows = [(stand(run_dir, queue), given) for run_dir, given in values.items()]
    rows.sort(key=lambda row: (*_rank(row[0], metric), STATES.index(row[0].state), row[0].run_dir.name))
    return Overview(folder, metric, rows, note, frozenset(folder / name for name in earlier))


def find_runs(folder: Path) -> list[Path]:
    """Run directories in `folder`: itself, or up to three levels below."""
    if is_run(folder):
        return [folder]
    found = []
    for depth in range(1, 4):
        found += [path for path in folder.glob("/".join("*" * depth)) if path.is_dir() and is_run(path)]
    return sorted(found)


def is_run(folder: Path) -> bool:
    return (folder / ATTEMPT).exists() or (folder / RECORD).exists()


def _rank(standing: Standing, metric: str) -> tuple[float, float]:
    """By the metric, of equal ones by loss; smaller is better."""
    best = standing.best or {}
    value = number(best, metric)
    if value is None:
        return math.inf, math.inf
    return (value if metric == "loss" else -value), loss_of(best)


def to_text(found: Overview) -> str:
    keys = list(dict.fromkeys(key for _, given in found.rows for key in given))
    shown = _distinct(keys)
    head = ["", "run", "state", "done", found.metric, *(shown[key] for key in keys), "at", "job", "restarts", "where"]
    lines = []
    for rank, (standing, given) in enumerate(found.rows, start=1):
        value = number(standing.best or {}, found.metric)
        at = f"{standing.stage} {standing.epoch}" if standing.stage else ""
        name = (
            standing.run_dir.name
            if standing.run_dir == found.folder
            else str(standing.run_dir.relative_to(found.folder))
        )
        lines.append(
            [
                str(rank) if value is not None else "",
                printable(name),
                standing.state,
                f"{100 * standing.progress:.0f}%" if standing.progress is not None else "",
                f"{value:.4f}" if value is not None else "",
                *(_cell(given.get(key)) for key in keys),
                at,
                standing.job_id or "",
                str(standing.restarts or ""),
                printable(
                    standing.host or (f"({standing.detail})" if standing.state in WAITS and standing.detail else "")
                ),
            ]
        )
    used = [i for i in range(len(head)) if i < 5 or any(line[i] for line in lines)]
    text = [table([[line[i] for i in used] for line in lines], [head[i] for i in used])]
    counts = Counter(standing.state for standing, _ in found.rows)
    text.append(", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]))
    text += [f"{s.run_dir.name}: {s.detail}" for s, _ in found.rows if s.detail and s.state in ("failed", "unknown")]
    if found.earlier:
        text.append(f"no longer in the sweep: {', '.join(sorted(path.name for path in found.earlier))}")
    if found.note:
        text.append(found.note)
    return "\n".join(text)


def to_json(found: Overview) -> str:
    runs = [
        {
            **asdict(standing),
            "run_dir": str(standing.run_dir),
            "values": given,
            "earlier": standing.run_dir in found.earlier,
        }
        for standing, given in found.rows
    ]
    whole: dict[str, Any] = {"folder": str(found.folder), "metric": found.metric, "note": found.note, "runs": runs}
    return json.dumps(json_safe(whole), indent=2)


def _distinct(keys: Sequence[str]) -> dict[str, str]:
    """The shortest endings of dotted keys that tell them apart."""
    found = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        found[key] = next(e for e in endings if sum(k == e or k.endswith(f".{e}") for k in keys) == 1 or e == key)
    return found


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
