"""Judgement of what several ranks found, without any GPU: the facts are made up."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from distil_tl.data.config import DataConfig
from distil_tl.distributed.config import DistributedConfig
from distil_tl.doctor import gpus, machine
from distil_tl.doctor.facts import Facts, lock_problem
from distil_tl.doctor.lines import FAIL, OK, WARN, Report
from tests.helpers.doctor import GIB, found, gpu_rank

SMI = """#!/bin/sh
case $1 in
  *driver*) echo 570.1.2;;
  *) echo 'GPU-a1, 4711, 3276'; echo 'GPU-a1, 5, [N/A]';;
esac
"""


def judged_gpus(facts: list[Facts], precision: str = "auto", **distributed) -> Report:
    report = Report()
    machine.judge_gpus(report, facts, DistributedConfig(**distributed), precision)
    return report


def judged_machine(facts: list[Facts], **data) -> Report:
    report, config = Report(), DataConfig(global_batch_size=256, **data)
    workers = 7 if config.workers is None else config.workers
    needs = {each.rank: machine.loading(config, workers, len(facts), 224) for each in facts}
    machine.judge_machine(report, facts, config, needs)
    return report


def test_a_sound_node() -> None:
    ranks = [gpu_rank(0), gpu_rank(1)]
    report = judged_gpus(ranks)
    machine.judge_versions(report, ranks)
    report.lines += judged_machine(ranks).lines
    assert found(report, FAIL) + found(report, WARN) == []
    assert "GPUs/rank 1: H100 (number 2 of 2 that it sees on n0), 79 GiB of 80 GiB free" in found(report, OK)[2]


def test_ranks_with_other_versions() -> None:
    report = Report()
    ranks = [gpu_rank(0), gpu_rank(1, versions={"torch": "2.13.0"}), gpu_rank(2, versions={"timm": "1.0.20"})]
    machine.judge_versions(report, ranks)
    assert found(report, FAIL) == [
        "versions/torch: torch 2.14.1 on ranks 0, 2; torch 2.13.0 on rank 1: use the same environment on all nodes"
    ]
    assert "timm missing on ranks 0-1; timm 1.0.20 on rank 2" in found(report, WARN)[0]


def test_two_ranks_on_one_gpu() -> None:
    ranks = [gpu_rank(0), gpu_rank(1, uuid="gpu-0")]
    (line,) = found(judged_gpus(ranks), FAIL)
    assert line.startswith("GPUs/one per rank: ranks 0-1 on n0 use one and the same GPU, gpu-0, which NCCL refuses")
    assert found(judged_gpus(ranks, backend="gloo"), FAIL) == []


def test_ranks_on_different_types_of_device() -> None:
    (line,) = found(judged_gpus([gpu_rank(0), gpu_rank(1, device="cpu")]), FAIL)
    assert "rank 1 would use cpu, rank 0 would use cuda: all must use the same" in line


def test_devices_that_training_refuses() -> None:
    problem = "2 processes on a node where torch sees 1 GPUs; start at most that many"
    report = judged_gpus([gpu_rank(0), *(gpu_rank(n, device="cpu", problem=problem) for n in (1, 2, 3))])
    assert found(report, FAIL) == [f"GPUs/device: ranks 1-3: {problem} (on n0, n1)"]


def test_gpus_that_torch_cannot_use() -> None:
    hidden = gpu_rank(
        0, visible=[], index=None, device="cpu", driver=None, reason="Torch not compiled with CUDA enabled"
    )
    report = judged_gpus([hidden])
    (line,) = found(report, WARN)
    assert "GPUs (2 device files /dev/nvidia*), but torch cannot use them: Torch not compiled with CUDA enabled" in line
    assert found(report, FAIL) == [], "training warns, and uses the CPU"


def test_a_driver_that_is_too_old() -> None:
    old = gpu_rank(0, driver="535.129.03", visible=[], index=None, device="cpu")
    report = judged_gpus([old])
    (line,) = found(report, WARN)
    assert "the driver 535.129.03 is older than 580.65, which CUDA 13.0 of this torch needs" in line
    assert found(report, FAIL) == []
    assert found(judged_gpus([old], device="cpu"), WARN) == []
    assert gpus.driver_problem("535.129.03", "12.8") is None


def test_a_gpu_that_does_not_compute_is_shared_or_emulates_bf16() -> None:
    fault = "CUDA error: no kernel image is available"
    (line,) = found(judged_gpus([gpu_rank(0, fault=fault)]), FAIL)
    assert f"a small computation failed: {fault}" in line
    report = judged_gpus([gpu_rank(0, others=["process 4711 with 3.2 GiB"], bf16=False)], precision="bf16")
    assert [line.partition(": ")[2] for line in found(report, WARN)] == [
        "not alone on it: process 4711 with 3.2 GiB",
        "bf16 is emulated on this GPU, and slow; precision=fp16 is faster",
    ]


def test_device_files_and_answers_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia0", "nvidia11", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert [path.name for path in gpus.device_files(tmp_path)] == ["nvidia0", "nvidia11"]
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI)
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpus.driver_version() == "570.1.2"
    assert gpus.other_processes() == [("GPU-a1", "process 4711 with 3.2 GiB"), ("GPU-a1", "process 5")]
    smi.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    assert gpus.other_processes() == []


def test_shared_memory_that_is_too_small() -> None:
    ranks = [gpu_rank(0, shm=64 << 20), gpu_rank(1, shm=64 << 20)]
    (line,) = [line for line in found(judged_machine(ranks), OK) if "/dev/shm" in line]
    assert line == "machine//dev/shm: 64 MiB free; loader processes hardly need it"
    for each in ranks:
        each.memory_files = False
    (line,) = found(judged_machine(ranks), WARN)
    assert line.startswith("machine//dev/shm: 64 MiB free, up to 4.02 GiB needed by 2 x 7 loader processes")
    assert "--shm-size" in line
    assert found(judged_machine(ranks, workers=0), WARN) == []
    (line,) = found(judged_machine([gpu_rank(0, shm=64 << 10)]), WARN)
    assert line.startswith("machine//dev/shm: 64 KiB free, 464 KiB needed for locks: images may be loaded in the ")
    (line,) = found(judged_machine([gpu_rank(0, locks="/dev/shm is mounted read-only: ...")]), WARN)
    assert line == "machine//dev/shm: /dev/shm is mounted read-only: ..."


def test_a_lock_that_can_not_be_created(monkeypatch: pytest.MonkeyPatch) -> None:
    def lock() -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    assert lock_problem() is None
    monkeypatch.setattr("multiprocessing.Lock", lock)
    assert "/dev/shm is mounted read-only: images will be loaded in the training process" in str(lock_problem())


def test_too_few_cpus_and_little_memory() -> None:
    (line,) = found(judged_machine([gpu_rank(0, cpus=4)], workers=12), WARN)
    assert "machine/CPUs: 4 for each rank, 12 loader processes: training will wait for images; request more" in line
    (line,) = found(judged_machine([gpu_rank(0, cpus=1, allowed_cpus=1)]), WARN)
    assert "this process may use 1 of 16" in line
    little = gpu_rank(0)
    little.memory = GIB
    (line,) = found(judged_machine([little]), WARN)
    assert line.startswith("machine/memory: 1 GiB free for 2 ranks, which may need")


def test_too_few_open_files() -> None:
    (line,) = found(judged_machine([gpu_rank(0), gpu_rank(1, open_files=256)]), WARN)
    assert line.startswith(
        "machine/open files: rank 1: 256 allowed, up to 296 needed; raise the limit with `ulimit -n 4096`"
    )
    assert found(judged_machine([gpu_rank(0, open_files=-1)]), WARN) == []  # unlimited
    assert found(judged_machine([gpu_rank(0, open_files=256)], prefetch_mib=1), WARN) == []  # one batch each


def test_clocks_that_differ() -> None:
    report = Report()
    machine.judge_clocks(report, {1: 0.04, 2: -7.2, 3: -7.1}, {0: "n0", 1: "n0", 2: "n1", 3: "n1"})
    (line,) = found(report, WARN)
    assert "n1 is 7 s behind n0" in line
