"""Judgement of what the ranks found: versions, GPUs, CPUs, memory, limits, clocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distil_tl.data.config import DataConfig
from distil_tl.data.loader import plan_batches
from distil_tl.data.loader_processes import SHM_REMEDY
from distil_tl.data.prefetch import SHM, batches_ahead
from distil_tl.distributed.config import DistributedConfig
from distil_tl.doctor.facts import OPTIONAL_PACKAGES, Facts
from distil_tl.doctor.gpus import driver_problem
from distil_tl.doctor.lines import FAIL, OK, WARN, Report, alike, counted, name_ranks, size

OTHER_FILES = 128  # that a rank opens: libraries, sockets, logs
RANK_MEMORY = 2 << 30  # bytes of a rank and its libraries, roughly
SKEW_SECONDS = 2.0


def judge_versions(report: Report, facts: Sequence[Facts]) -> None:
    """Lines about versions, which should be equal on all ranks, and must be for torch and this package."""
    group, first = "versions", facts[0].versions
    core = ("distil_tl", "python", "torch", "torchvision", "CUDA", "NCCL", "cuDNN")
    report.ok(group, "main", ", ".join(f"{name} {first[name]}" for name in core if name in first))
    others = [name for name in first if name not in core]
    report.ok(group, "others", ", ".join(f"{name} {first[name]}" for name in others))
    absent = [name for name in OPTIONAL_PACKAGES if name not in first]
    if absent:
        report.ok(group, "not installed", f"{', '.join(absent)} (optional)")
    for name in dict.fromkeys(name for each in facts for name in each.versions):
        found: dict[str, list[int]] = defaultdict(list)
        for each in facts:
            found[each.versions.get(name, "missing")].append(each.rank)
        if len(found) > 1:
            text = "; ".join(f"{name} {version} on {name_ranks(ranks)}" for version, ranks in found.items())
            status = FAIL if name in ("torch", "distil_tl") else WARN
            report.add(group, name, status, f"{text}: use the same environment on all nodes")


def judge_gpus(report: Report, facts: Sequence[Facts], config: DistributedConfig, precision: str) -> None:
    """Lines about the device of each rank."""
    group = "GPUs"
    if config.device != "cpu":
        _judge_drivers(report, group, facts)
    _judge_devices(report, group, facts, config)
    _judge_shared(report, group, facts, config)
    for each in facts:
        if each.device == "cuda" and each.gpu.index is not None:
            _judge_gpu(report, group, each, precision, several=len(facts) > 1)


def _judge_drivers(report: Report, group: str, facts: Sequence[Facts]) -> None:
    """Lines about drivers. Here is no failure: training itself says which device it refuses, in `gpu.problem`."""
    results = {}
    for each in facts:
        gpu, cuda = each.gpu, each.versions.get("CUDA")
        problem = driver_problem(gpu.driver, cuda) if gpu.driver and cuda else None
        if problem is not None:
            results[each.rank] = (WARN, problem)
        elif (gpu.files or gpu.driver) and not gpu.visible:
            found = f"{gpu.files} device files /dev/nvidia*" if gpu.files else f"driver {gpu.driver}"
            results[each.rank] = (
                WARN, f"this machine has GPUs ({found}), but torch cannot use them: {gpu.reason}; repair that, or set "
                f"distributed.device=cpu",
            )  # fmt: skip
        elif gpu.driver:
            results[each.rank] = (OK, f"{gpu.driver}, new enough for CUDA {cuda}" if cuda else gpu.driver)
    report.per_rank(group, "driver", results, of=len(facts))


def _judge_devices(report: Report, group: str, facts: Sequence[Facts], config: DistributedConfig) -> None:
    """Lines about devices that training refuses, and about ranks with different types of device."""
    hosts: dict[str, list[str]] = defaultdict(list)
    for each in facts:
        if each.gpu.problem and each.host not in hosts[each.gpu.problem]:
            hosts[each.gpu.problem].append(each.host)
    refused = {
        e.rank: (FAIL, f"{e.gpu.problem} (on {', '.join(hosts[e.gpu.problem])})") for e in facts if e.gpu.problem
    }
    report.per_rank(group, "device", refused, of=len(facts))
    devices: dict[str, list[int]] = defaultdict(list)
    for each in facts:
        devices[each.device].append(each.rank)
    if refused:
        return
    if len(devices) > 1:
        text = ", ".join(f"{name_ranks(ranks)} would use {device}" for device, ranks in sorted(devices.items()))
        report.fail(group, "device", f"{text}: all must use the same; set distributed.device, or repair the nodes")
    elif "cpu" in devices:
        reason = "as distributed.device says" if config.device == "cpu" else facts[0].gpu.reason
        report.ok(group, "device", f"CPU{f': {reason}' if reason else ''}")


def _judge_shared(report: Report, group: str, facts: Sequence[Facts], config: DistributedConfig) -> None:
    """Lines about ranks that use one and the same GPU."""
    users: dict[str, list[int]] = defaultdict(list)
    hosts = {each.rank: each.host for each in facts}
    for each in facts:
        if each.device == "cuda" and each.gpu.uuid:
            users[each.gpu.uuid].append(each.rank)
    for uuid, ranks in users.items():
        if len(ranks) > 1:
            where = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks))
            text = f"{name_ranks(ranks)} on {where} use one and the same GPU, {uuid}"
            if config.backend == "gloo":
                report.warn(group, "one per rank", f"{text}, and share its memory and time")
            else:
                report.fail(group, "one per rank", f"{text}, which NCCL refuses; start one rank per GPU")


def _judge_gpu(report: Report, group: str, each: Facts, precision: str, *, several: bool) -> None:
    gpu = each.gpu
    name = f"rank {each.rank}" if several else "GPU"
    number = 0 if gpu.index is None else gpu.index + 1
    text = (
        f"{gpu.name} (number {number} of {len(gpu.visible)} that it sees on {each.host}), "
        f"{size(gpu.free)} of {size(gpu.memory)} free, compute capability {gpu.capability}, {gpu.uuid}"
    )
    if gpu.fault is not None:
        report.fail(group, name, f"{text}: a small computation failed: {gpu.fault}; use another GPU, or another torch")
        return
    report.ok(group, name, text)
    if gpu.others:
        report.warn(group, name, f"not alone on it: {', '.join(gpu.others)}")
    if not gpu.bf16:
        status = WARN if precision == "bf16" else OK
        report.add(group, name, status, "bf16 is emulated on this GPU, and slow; precision=fp16 is faster")


@dataclass(frozen=True)
class Loading:
    """What the loader processes of a rank need.

    Attributes:
        workers: loader processes.
        batch_bytes: bytes of one batch.
        limit_mib: `data.prefetch_mib`.
    """

    workers: int
    batch_bytes: int
    limit_mib: int

    @property
    def batches(self) -> int:
        """The batches that each loader process makes ahead, at most."""
        return batches_ahead(self.workers, self.batch_bytes, self.limit_mib)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the batches that wait, for training and evaluation."""
        return 2 * self.workers * self.batches * self.batch_bytes

    @property
    def locks(self) -> int:
        """Bytes in /dev/shm for the locks of two loaders: a page for each."""
        return 2 * 4096 * (8 + 3 * self.workers) if self.workers else 0

    @property
    def open_files(self) -> int:
        return OTHER_FILES + 2 * self.workers * (self.batches + 4)  # a batch that waits is one


def loading(config: DataConfig, workers: int, world_size: int, image_size: int) -> Loading:
    """What a rank with this number of loader processes needs."""
    micro = plan_batches(max(config.largest_batch_size, world_size), world_size, config.max_local_batch_size).micro
    return Loading(workers, micro * 3 * image_size * image_size, config.prefetch_mib)


def judge_machine(report: Report, facts: Sequence[Facts], config: DataConfig, needs: Mapping[int, Loading]) -> None:
    """Lines about CPUs, shared memory, open files and memory.

    Args:
        needs: by rank.
    """
    group = "machine"
    cpus, shm, files, memory = (dict[int, tuple[str, str]]() for _ in range(4))
    for each in facts:
        need, ranks = needs[each.rank], each.local_world_size
        text = f"{each.cpus} for each rank, {counted(need.workers, 'loader process')}"
        if config.workers is not None and each.cpus < config.workers:
            cpus[each.rank] = (WARN, f"{text}: training will wait for images; {_MORE_CPUS}")
        elif config.workers is None and each.cpus < 2 and each.allowed_cpus < each.machine_cpus:
            cpus[each.rank] = (WARN, f"{text}, as this process may use {each.allowed_cpus} of {each.machine_cpus}: "
                               f"training will wait for images; {_MORE_CPUS}")  # fmt: skip
        else:
            cpus[each.rank] = (OK, text)
        if each.locks is not None and need.workers:
            shm[each.rank] = (WARN, each.locks)
        elif each.shm is not None and each.memory_files and each.shm < need.locks * ranks:
            shm[each.rank] = (
                WARN, f"{size(each.shm)} free, {size(need.locks * ranks)} needed for locks: images may be loaded in "
                f"the training process, which takes much longer; {SHM_REMEDY}",
            )  # fmt: skip
        elif each.shm is not None and each.memory_files:
            shm[each.rank] = (OK, f"{size(each.shm)} free; loader processes hardly need it")
        elif each.shm is not None:
            wanted = need.waiting_bytes * ranks
            text = f"{size(each.shm)} free, up to {size(wanted)} needed"
            shm[each.rank] = (OK, text) if each.shm >= wanted else (
                WARN, f"{text} by {ranks} x {need.workers} loader processes; there may be fewer of them. Start the "
                f"container with a larger --shm-size, or reduce data.workers or data.max_local_batch_size",
            )  # fmt: skip
        text = f"{each.open_files} allowed, up to {need.open_files} needed"
        files[each.rank] = (OK, text) if each.open_files < 0 or each.open_files >= need.open_files else (
            WARN, f"{text}; raise the limit with `ulimit -n {max(4096, need.open_files)}`, or reduce data.workers",
        )  # fmt: skip
        needed = ranks * (RANK_MEMORY + need.waiting_bytes)
        text = f"{size(each.memory)} free for {counted(ranks, 'rank')}"
        memory[each.rank] = (OK, text) if each.memory >= needed else (
            WARN, f"{text}, which may need {size(needed)}; request more memory, or reduce data.workers",
        )  # fmt: skip
    report.per_rank(group, "CPUs", cpus)
    report.per_rank(group, SHM, shm)
    report.per_rank(group, "open files", files)
    report.per_rank(group, "memory", alike(memory))


_MORE_CPUS = "request more CPUs with slurm.cpus_per_task (launch.submit) or --cpus-per-task (srun), or set data.workers"


def judge_clocks(report: Report, offsets: Mapping[int, float], hosts: Mapping[int, str]) -> None:
    """A line about ranks whose clock differs from that of rank 0, by seconds."""
    far = {rank: offset for rank, offset in offsets.items() if abs(offset) > SKEW_SECONDS}
    for host in dict.fromkeys(hosts[rank] for rank in far):
        offset = next(far[rank] for rank in far if hosts[rank] == host)
        report.warn(
            "machine", "clock", f"{host} is {abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'} "
            f"{hosts.get(0, 'rank 0')}; times in logs and of files are not comparable: check NTP",
        )  # fmt: skip
    if offsets and not far:
        report.ok("machine", "clocks", f"differ by at most {max(map(abs, offsets.values())):.1f} s")
