"""One stand-in rank: the package's own code from the rendezvous to the end, without a model and without images.

It connects, meets the other ranks, forms the group and does each collective that a run does. Then one rank gets a
SIGTERM, all agree to stop, and leave as a preempted run does.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from benchmarks.scale.files import synthetic_index
from distil_tl.data.splits import share_indexes
from distil_tl.distributed import process_group, store
from distil_tl.distributed.collectives import average_over_ranks, gather_objects, gather_rows, sum_over_ranks
from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.launch_env import read_launch
from distil_tl.distributed.preemption import Agreement, Request, StopSignal
from distil_tl.distributed.process_group import DistInfo, init_distributed
from distil_tl.distributed.rank_zero import on_rank_zero, once_per_node
from distil_tl.utils.errors import PreemptedError
from distil_tl.utils.log import setup_console

Result = TypeVar("Result")

CLASSES = 1000  # of the confusion matrix
MISTAKES = 100  # most confident ones that are gathered
BUFFERS = 53_120  # running statistics of ResNet-50, float32
POLLS = 5
STEP_SECONDS = 0.01  # of the training that a signal stops


@dataclass
class Part:
    """What a part cost this rank. `sent`: bytes from the interface of its node to other nodes."""

    began: float
    ended: float
    cpu_seconds: float
    requests: int  # to the store, by this package; torch makes further ones while it forms the group
    sent: int


@dataclass
class Costs:
    """The parts of one rank, by name, in order."""

    interface: str
    parts: dict[str, Part] = field(default_factory=dict)
    requests: int = 0

    def measure(self, name: str, work: Callable[[], Result]) -> Result:
        began, cpu, requests, sent = time.monotonic(), _cpu_seconds(), self.requests, sent_bytes(self.interface)
        result = work()
        sent = sent_bytes(self.interface) - sent
        self.parts[name] = Part(began, time.monotonic(), _cpu_seconds() - cpu, self.requests - requests, sent)
        return result


def sent_bytes(interface: str) -> int:
    """Bytes sent on an interface of this process's network namespace."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            return int(numbers.split()[8])
    return 0


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def observed(costs: Costs) -> Iterator[None]:
    """Measure the steps of `init_distributed`, and count the requests to the store."""
    places = [
        (process_group, "connect", "rendezvous"), (store, "_agree_on_name", "name of the start"),
        (process_group, "meet", "meeting, watchdog"), (dist, "init_process_group", "gloo group"),
    ]  # fmt: skip
    former: list[tuple[Any, str, Any]] = []

    def replace(place: Any, name: str, new: Callable[[Any], Any]) -> None:
        former.append((place, name, getattr(place, name)))
        setattr(place, name, new(former[-1][2]))

    def measured(part: str) -> Callable[[Any], Any]:
        return lambda work: lambda *args, **kwargs: costs.measure(part, lambda: work(*args, **kwargs))

    def counted(work: Any) -> Any:
        def request(*args: Any, **kwargs: Any) -> Any:
            costs.requests += 1
            return work(*args, **kwargs)

        return request

    for place, name, part in places:
        replace(place, name, measured(part))
    replace(store, "within", counted)
    try:
        yield
    finally:
        for place, name, old in former:
            setattr(place, name, old)


def run(task: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> int:
    """The whole life of a rank. Returns its exit status; `report` gets what it measured before it leaves."""
    setup_console(False)
    launch = read_launch(os.environ)
    costs = Costs(task["interface"])
    config = DistributedConfig(device="cpu", timeout_seconds=task["timeout"], heartbeat_seconds=task["heartbeat"])
    try:
        with StopSignal() as stop, observed(costs), init_distributed(launch, config) as info:
            formed = time.monotonic()
            work_of_all(info, costs, task["files"])
            stop.defer()
            info.training_started = True
            stopping = stop_together(info, stop, costs)
            parts = {name: asdict(part) for name, part in costs.parts.items()}
            report({
                "rank": info.rank, "reported": time.monotonic(), "formed": formed, "parts": parts,
                "stop_seconds": stopping, **memory(info),
            })  # fmt: skip
            raise PreemptedError("stopped")
    except PreemptedError:
        return 3


def work_of_all(info: DistInfo, costs: Costs, files: int) -> None:
    """What the ranks of a run do together apart from the training itself."""
    indexes = {"train": synthetic_index(files)} if info.is_main and files else {}
    agreement = Agreement(info, lambda: Request.CONTINUE)
    done = list[int]()

    def polls() -> None:
        for _ in range(POLLS):
            agreement.exchange_now()

    works: dict[str, Callable[[], Any]] = {
        "work of rank 0": lambda: on_rank_zero(info, "nothing", lambda: None),
        "once per node": lambda: once_per_node(info, "nothing", lambda: done.append(1)),
        "index": lambda: share_indexes(info, lambda: indexes),
        f"{POLLS} polls": polls,
        "values of all ranks": lambda: gather_objects(info, [info.rank, "a host name", {"jpeg": "0" * 64}]),
        "sums of metrics": lambda: sum_over_ranks(info, torch.zeros(16, dtype=torch.float64)),
        "confusion matrix": lambda: sum_over_ranks(info, torch.zeros(CLASSES, CLASSES, dtype=torch.int64)),
        "mistakes": lambda: gather_rows(info, torch.zeros(MISTAKES, 4, dtype=torch.float64), MISTAKES),
        "BatchNorm statistics": lambda: average_over_ranks(info, [torch.zeros(BUFFERS)]),
    }
    for name, work in works.items():
        dist.barrier()
        costs.measure(name, work)


def stop_together(info: DistInfo, stop: StopSignal, costs: Costs) -> float:
    """Short steps until all agree to stop, after a SIGTERM to the last rank. Returns seconds from the signal on."""
    agreement = Agreement(info, lambda: Request.STOP if stop else Request.CONTINUE)
    sent = [0.0]

    def train() -> None:
        step = 0
        while agreement.exchange() is not Request.STOP:
            time.sleep(STEP_SECONDS)
            step += 1
            if step == 10 and info.rank == info.world_size - 1:
                sent[0] = time.monotonic()
                os.kill(os.getpid(), signal.SIGTERM)

    dist.barrier()
    costs.measure("agreement to stop", train)
    stopped_at = time.monotonic()
    # The clock is that of the machine, so equal for all ranks.
    sent_at: float = max(gather_objects(info, sent[0]))
    return stopped_at - sent_at


def memory(info: DistInfo) -> dict[str, float]:
    """Memory in MiB that this rank and its watchdog do not share, and the file descriptors of this rank."""
    watchdog = None if info.watchdog is None else info.watchdog.process
    return {
        "private_mb": _private_mb("self"),
        "watchdog_mb": 0.0 if watchdog is None else _private_mb(str(watchdog.pid)),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
    }


def _private_mb(process: str) -> float:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # the watchdog is gone, or it is not Linux
        return 0.0
    return sum(float(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:"))) / 1024


def be_lost(task: dict[str, Any]) -> int:
    """A rank of a run in which the last one kills itself while the others wait for it."""
    setup_console(False)
    launch = read_launch(os.environ)
    config = DistributedConfig(device="cpu", timeout_seconds=task["timeout"], heartbeat_seconds=task["heartbeat"])
    try:
        with init_distributed(launch, config) as info:
            dist.barrier()
            if info.rank == info.world_size - 1:
                Path(task["killed_at"]).write_text(repr(time.monotonic()))
                os.kill(os.getpid(), signal.SIGKILL)
            dist.barrier()
    except Exception as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0
