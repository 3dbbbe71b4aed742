"""One rank: shares an index, takes its first samples, and watches its own memory and its loader processes'."""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.scale.files import synthetic_index
from distil_tl.data.loader import ImageDataset, make_loader
from distil_tl.data.sampler import TrainSampler
from distil_tl.data.splits import share_indexes
from distil_tl.data.transforms import eval_transform
from distil_tl.distributed.collectives import gather_objects
from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.launch_env import read_launch
from distil_tl.distributed.process_group import DistInfo, session
from distil_tl.models.preprocess import Preprocess

SIZE, BATCH, WORKERS = 8, 512, 2


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    files, batches = task["files"], task["batches"]
    with session(read_launch(os.environ), DistributedConfig(device="cpu")) as info:
        found = measure(info, files, batches)
    Path(sys.argv[2]).write_text(json.dumps(found))


def measure(info: DistInfo, files: int, batches: int) -> dict[str, Any]:
    """Seconds, and MiB of memory: before, with the index, at most, and of each loader process over time."""
    made = {"train": synthetic_index(files)} if info.is_main else {}
    one_copy = sum(array.nbytes for index in made.values() for array in index.to_arrays().values())
    gc.collect()
    before = memory(os.getpid())
    gather_objects(info, None)  # begin together
    began = time.monotonic()
    index = share_indexes(info, lambda: made)["train"]
    shared = time.monotonic() - began
    made.clear()
    gc.collect()
    gather_objects(info, None)
    with_index = memory(os.getpid())

    sampler = TrainSampler(
        len(index), global_batch_size=BATCH * info.world_size, world_size=info.world_size, rank=info.rank, seed=0,
        stage="full",
    )  # fmt: skip
    began = time.monotonic()
    next(iter(sampler))
    order = time.monotonic() - began
    dataset = ImageDataset(index, eval_transform(Preprocess(), SIZE), SIZE)
    loader = make_loader(dataset, sampler, batch_size=BATCH, workers=WORKERS, pin_memory=False)
    began = time.monotonic()
    steps = iter(loader)
    next(steps)
    first_batch = time.monotonic() - began
    workers = list(watch(steps, batches))
    return {
        "one_copy_mb": one_copy / 2**20,
        "share_seconds": shared,
        "order_seconds": order,
        "first_batch_seconds": first_batch,
        "before": before,
        "with_index": with_index,
        "training": memory(os.getpid()),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "workers": workers,
    }


def watch(steps: Iterator[Any], batches: int) -> Iterator[dict[str, Any]]:
    """The memory of loader processes after 1, 2, 4, ... batches, as far as there are some."""
    seen, mark = 1, 1
    while True:
        pids = [p.pid for p in multiprocessing.active_children() if p.pid is not None]
        own = [memory(pid)["private_mb"] for pid in pids]
        yield {"batches": seen, "private_mb": max(own, default=0.0)}
        if mark >= batches:
            return
        mark *= 2
        taken = sum(1 for _ in itertools.islice(steps, mark - seen))
        seen += taken
        if seen < mark:
            return


def memory(pid: int) -> dict[str, float]:
    """MiB of a process: its alone; its proportional share of what it maps, which adds up; and files in memory it maps.

    These last, which the ranks of a node share, are not in the first two: what a process has touched of them says
    little.
    """
    found = {"private_mb": 0.0, "share_mb": 0.0}
    files: dict[str, float] = {}
    shared = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *fields = line.split()
        if not name.endswith(":"):  # the line with which a mapping begins
            shared = "/memfd:distil_tl" in line
            if shared:
                first, last = (int(address, 16) for address in name.split("-"))
                files[fields[3]] = (last - first) / 2**20
        elif not shared and name in ("Private_Clean:", "Private_Dirty:"):
            found["private_mb"] += float(fields[0]) / 1024
        elif not shared and name == "Pss:":
            found["share_mb"] += float(fields[0]) / 1024
    return {**found, "files_mb": sum(files.values())}


if __name__ == "__main__":
    main()
