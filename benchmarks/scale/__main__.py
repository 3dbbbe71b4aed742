"""`python -m benchmarks.scale`: start-up and memory by files and ranks, gradients, a slow link, many stand-in ranks."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Results, Spread, end_on_sigterm, log, markdown
from benchmarks.scale import link
from benchmarks.scale.files import write_tree
from benchmarks.scale.many_ranks import stand_ins
from benchmarks.scale.ranks import run_ranks
from distil_tl.data.scan import scan
from distil_tl.utils.command import run_command
from distil_tl.utils.threads import available_cpus

PARTS = ("startup", "tree", "traffic", "link", "stand-ins")


def main(args: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if args is None else list(args))
    return run_command("benchmarks.scale", lambda: benchmark(options))


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--files", type=int, nargs="+", default=[1_000_000, 10_000_000], help="of the synthetic index")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="for startup")
    parser.add_argument("--batches", type=int, default=256, help="of 512 samples, while loader memory is measured")
    parser.add_argument("--tree", type=int, default=200_000, help="number of files in the real folder tree")
    parser.add_argument("--model", default="resnet50", help="as model.name")
    parser.add_argument("--image-size", type=int, default=64, help="pixels; the gradients do not depend on it")
    parser.add_argument("--unfreeze", nargs="+", default=["head", "2", "3", "all"], help="as stages.NAME.unfreeze")
    parser.add_argument("--mbit", type=int, nargs="+", default=[100, 1000, 10_000], help="bandwidth, megabits/s")
    parser.add_argument("--steps", type=int, default=6, help="training steps over the link, 8 images per rank")
    parser.add_argument("--stand-ins", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256], help="numbers of ranks")
    parser.add_argument("--modelled", type=int, default=4096, help="number of ranks of the extrapolation")
    parser.add_argument("--per-node", type=int, default=8, help="stand-in ranks of a node")
    parser.add_argument("--node-mbit", type=int, default=10_000, help="bandwidth of such a node, megabits/s")
    parser.add_argument("--index", type=int, default=100_000, help="files of the index that stand-in ranks share")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/scale.json"), help="file of results")
    parser.add_argument("--fresh", action="store_true", help="start again and replace --out")
    options = parser.parse_args(args)
    numbers = [*options.files, *options.ranks, *options.mbit, options.tree, options.repeats, options.batches]
    numbers += [*options.stand_ins, options.modelled, options.per_node, options.node_mbit, options.index]
    if min(numbers) < 1 or options.steps < 2 or min(options.stand_ins) < 2:
        parser.error("all numbers must be at least 1, and --steps and --stand-ins at least 2")
    if min(options.files) < 512 * max(options.ranks):
        parser.error(f"--files must be at least one batch of 512 per rank, {512 * max(options.ranks)}")
    return options


def benchmark(options: argparse.Namespace) -> None:
    end_on_sigterm()
    keys = ("batches", "tree", "model", "image_size", "steps", "repeats", "per_node", "node_mbit", "index")
    results = Results(options.out, {key: getattr(options, key) for key in keys}, fresh=options.fresh)
    with tempfile.TemporaryDirectory(prefix="distil-tl-scale-") as temporary:
        parts = {"startup": startup, "tree": tree, "traffic": traffic, "link": slow_link, "stand-ins": stand_ins}
        text = "\n".join(parts[name](options, results, Path(temporary)) for name in options.parts)
    path = results.write_report(text)
    sys.stdout.write(f"{text}\n{results.path}\n{path}\n")


def startup(options: argparse.Namespace, results: Results, work: Path) -> str:
    rows, growth = [], []
    for files in options.files:
        for world in options.ranks:

            def measure(files: int = files, world: int = world) -> Any:
                log(f"an index of {files:,} files, {world} ranks")
                task = {"files": files, "batches": options.batches}
                return [
                    run_ranks(world, "benchmarks.scale.startup", task, work, OMP_NUM_THREADS="1")
                    for _ in range(options.repeats)
                ]

            repeats = results.once(f"startup {files} {world}", measure)
            rows.append([f"{files:,}", world, *startup_row(repeats)])
            marks = repeats[0][0]["workers"]
            growth.append([f"{files:,}", world, *[f"{mark['private_mb']:.0f}" for mark in marks]])
    marks = [mark["batches"] for mark in marks]
    header = ["files", "ranks", "one copy, MiB", "s to share it", "s to order an epoch", "s to the first batch",
              "all ranks, with the index", "beyond one copy", "largest peak of a rank"]  # fmt: skip
    return (
        "**Start-up** with a synthetic index, on one node. Memory in MiB: proportional set size of the ranks, minus "
        f"its value before the index:\n\n{markdown(header, rows)}\n"
        "**Loader processes**: private memory in MiB, the larger of rank 0's two, after so many batches of 512:\n\n"
        + markdown(["files", "ranks", *map(str, marks)], growth)
    )


def startup_row(repeats: list[list[dict[str, Any]]]) -> list[str]:
    """The last columns of a row: seconds of the slowest rank, and memory of all ranks together, over the repeats."""
    slowest = [
        Spread.of([max(rank[key] for rank in ranks) for ranks in repeats]).text(2)
        for key in ("share_seconds", "order_seconds", "first_batch_seconds")
    ]
    # Rank 0 makes the index before it is shared, so its memory before includes one copy. The copy that the ranks share
    # is in memory-mapped files.
    copy = repeats[0][0]["one_copy_mb"]
    more = [
        copy + ranks[0]["with_index"]["files_mb"]
        + sum(rank["with_index"]["share_mb"] - rank["before"]["share_mb"] for rank in ranks)
        for ranks in repeats
    ]  # fmt: skip
    peak = Spread.of([max(rank["peak_mb"] for rank in ranks) for ranks in repeats])
    total = Spread.of(more)
    beyond = Spread.of([value - copy for value in more])
    return [f"{copy:.0f}", *slowest, total.text(0), beyond.text(0), peak.text(0)]


def tree(options: argparse.Namespace, results: Results, work: Path) -> str:
    def measure() -> dict[str, Any]:
        log(f"writing {options.tree:,} files")
        root = write_tree(work / "tree", options.tree)
        cold = None
        if os.geteuid() == 0:
            cold = [_scan(root, cold=True) for _ in range(options.repeats)]
        return {"cold": cold, "warm": [_scan(root, cold=False) for _ in range(options.repeats)]}

    scans = results.once("tree", measure)
    rows = []
    for state in ("cold", "warm"):
        if scans[state] is None:
            rows.append([state, "not measured: dropping the kernel's caches needs root", None])
            continue
        seconds = Spread.of([seconds for seconds, _ in scans[state]])
        rows.append([state, seconds.text(2), f"{scans[state][0][1] / seconds.median:,.0f}"])
    return f"**A scan of {options.tree:,} files** in class folders on a local disk:\n\n" + markdown(
        ["kernel caches", "seconds", "files/s"], rows
    )


def _scan(root: Path, *, cold: bool) -> tuple[float, int]:
    """Seconds, and the number of files."""
    if cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    began = time.monotonic()
    index = scan(root)
    return time.monotonic() - began, len(index)


def stages(options: argparse.Namespace) -> dict[str, Any]:
    return {name: int(name) if name.isdigit() else name for name in options.unfreeze}


def traffic(options: argparse.Namespace, results: Results, work: Path) -> str:
    def measure() -> Any:
        log("gradients of each stage, on 2 ranks")
        task = {"model": options.model, "image_size": options.image_size, "steps": 2, "batch": 2, "count": True,
                "stages": stages(options)}  # fmt: skip
        return run_ranks(2, "benchmarks.scale.traffic", task, work, OMP_NUM_THREADS="1")[0]

    by_stage = results.once("traffic", measure)
    rows = [
        [name, f"{stage['trainable_parameters']:,}", f"{stage['reduced_bytes']:,}"] for name, stage in by_stage.items()
    ]
    return (
        f"**Gradients** of {options.model} with 10 classes: bytes that DDP reduces in each step, counted in DDP:\n\n"
        + markdown(["unfreeze", "trainable parameters", "bytes"], rows)
    )


def slow_link(options: argparse.Namespace, results: Results, work: Path) -> str:
    reason = results.once("no link", link.missing)
    if reason is not None:
        return f"**Slow link**: skipped: {reason}.\n"
    rates: list[int | None] = [None, *sorted(options.mbit, reverse=True)]
    runs = {}
    for mbit in rates:
        for compression in ("none", "bf16"):
            name = f"link {mbit} {compression}"

            def measure(mbit: int | None = mbit, compression: str = compression) -> Any:
                log(f"training over a link of {mbit or 'unlimited'} Mbit/s, compression {compression}")
                return [_over_link(options, work, mbit, compression) for _ in range(options.repeats)]

            runs[name] = results.once(name, measure)
    rows = []
    for mbit in rates:
        for compression in ("none", "bf16"):
            rows.append([mbit or "no limit", compression, *_efficiencies(runs, mbit, compression)])
    cpus = available_cpus()
    return (
        f"**A link** between two network namespaces, one rank of one thread in each ({cpus} CPUs), {options.model} at "
        f"{options.image_size} px, 8 images per rank. Seconds per step, and the efficiency compared with no limit and "
        f"no compression:\n\n"
        + markdown(["Mbit/s", "compression", *[f"unfreeze {name}" for name in options.unfreeze]], rows)
    )


def _over_link(options: argparse.Namespace, work: Path, mbit: int | None, compression: str) -> dict[str, Any]:
    task = {"model": options.model, "image_size": options.image_size, "steps": options.steps, "batch": 8,
            "stages": stages(options), "compression": compression}  # fmt: skip
    with link.link(mbit) as made:
        return run_ranks(
            2, "benchmarks.scale.traffic", task, work, prefixes=made.prefixes, address=made.address,
            GLOO_SOCKET_IFNAME=made.interface, OMP_NUM_THREADS="1",
        )[0]  # fmt: skip


def _efficiencies(runs: dict[str, Any], mbit: int | None, compression: str) -> list[str]:
    cells = []
    for name in runs["link None none"][0]:
        unlimited = Spread.of([run[name]["step_seconds"] for run in runs["link None none"]]).median
        spread = Spread.of([run[name]["step_seconds"] for run in runs[f"link {mbit} {compression}"]])
        cells.append(f"{spread.text(3)}, {unlimited / spread.median:.2f}")
    return cells


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"benchmarks.scale: {error}: {error.stderr}")
