"""One rank: shares an index, takes the first samples, and measures its memory and that of its loader processes."""

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
from distil_tl.data.sampler import TrainSampler, in_batches
from distil_tl.data.splits import share_indexes
from distil_tl.data.transforms import eval_transform
from distil_tl.distributed.collectives import gather_objects
from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.launch_env import read_launch
from distil_tl.distributed.process_group import DistInfo, init_distributed
from distil_tl.models.preprocess import Preprocess

SIZE, BATCH, WORKERS = 8, 512, 2


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    files, batches = task["files"], task["batches"]
    with init_distributed(read_launch(os.environ), DistributedConfig(device="cpu")) as info:
        result = measure(info, files, batches)
    Path(sys.argv[2]).write_text(json.dumps(result))


def measure(info: DistInfo, files: int, batches: int) -> dict[str, Any]:
    """Seconds, and memory in MiB: before, with the index, at its peak, and of each loader process over time."""
    indexes = {"train": synthetic_index(files)} if info.is_main else {}
    one_copy = sum(array.nbytes for index in indexes.values() for array in index.to_arrays().values())
    gc.collect()
    before = memory(os.getpid())
    gather_objects(info, None)  # wait for all ranks
    began = time.monotonic()
    index = share_indexes(info, lambda: indexes)["train"]
    shared = time.monotonic() - began
    indexes.clear()
    gc.collect()
    gather_objects(info, None)
    with_index = memory(os.getpid())

    sampler = TrainSampler(
        len(index), global_batch_size=BATCH * info.world_size, world_size=info.world_size, rank=info.rank, seed=0,
        stage="full", epochs=1,
    )  # fmt: skip
    began = time.monotonic()
    next(iter(sampler))
    order = time.monotonic() - began
    dataset = ImageDataset(index, eval_transform(Preprocess(), SIZE), SIZE)
    loader = make_loader(dataset, in_batches(sampler, BATCH), workers=WORKERS, ahead=4, pin_memory=False)
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
    """The memory of the loader processes after 1, 2, 4, ... batches, up to `batches` or the end of the epoch."""
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
    """Memory of a process in MiB.

    Returns:
        private_mb: pages that only this process maps.
        share_mb: proportional set size, whose sum over processes counts no page twice.
        files_mb: size of the index's memory-mapped files, which the ranks of a node share. It is not included in the
            other two, as they would only count the pages that the process has read so far.
    """
    memory = {"private_mb": 0.0, "share_mb": 0.0}
    files: dict[str, float] = {}
    shared = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *fields = line.split()
        if not name.endswith(":"):  # the first line of a mapping
            shared = "/memfd:distil_tl" in line
            if shared:
                first, last = (int(address, 16) for address in name.split("-"))
                files[fields[3]] = (last - first) / 2**20
        elif not shared and name in ("Private_Clean:", "Private_Dirty:"):
            memory["private_mb"] += float(fields[0]) / 1024
        elif not shared and name == "Pss:":
            memory["share_mb"] += float(fields[0]) / 1024
    return {**memory, "files_mb": sum(files.values())}


if __name__ == "__main__":
    main()
