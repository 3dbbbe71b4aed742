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
from distil_tl.collectives import gather_objects
from distil_tl.data.loader import ImageDataset, make_loader
from distil_tl.data.sampler import TrainSampler
from distil_tl.data.splits import share_indexes
from distil_tl.data.transforms import Preprocess, eval_transform
from distil_tl.distributed import DistInfo, DistributedConfig, session
from distil_tl.launched import read_launch

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
    """MiB that are a process's alone, and its proportional share of all that it maps, which adds up over processes."""
    fields: dict[str, float] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        fields[name] = float(rest.split()[0]) / 1024
    return {"private_mb": fields["Private_Clean"] + fields["Private_Dirty"], "share_mb": fields["Pss"]}


if __name__ == "__main__":
    main()
