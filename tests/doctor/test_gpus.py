"""What a rank finds out about its GPU, with torch's functions replaced."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.launch_env import Launch
from distil_tl.doctor import gpus
from distil_tl.doctor.facts import Facts, gather
from distil_tl.doctor.folders import FolderFacts
from tests.helpers.doctor import GIB, gpu_rank

AUTO = DistributedConfig()


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs that can be described, but do not compute."""
    properties = [
        SimpleNamespace(name=name, total_memory=16 * GIB, major=major, minor=5, uuid=f"{name}-1")
        for name, major in (("A10", 8), ("T4", 7))
    ]

    def no_ones(*shape: int, device: torch.device) -> torch.Tensor:
        raise RuntimeError(f"CUDA error: no kernel image is available\non {device}")

    chosen = [0]

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        chosen.append(index)
        yield
        chosen.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: properties[index].name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (3 * GIB, 16 * GIB))
    monkeypatch.setattr(torch, "ones", no_ones)
    rows = [("GPU-T4-1", "process 4711"), ("GPU-A10-1", "process 5")]
    monkeypatch.setattr(gpus, "other_processes", lambda: rows)


def test_each_rank_describes_its_own_gpu(two_gpus: None) -> None:
    device, facts = gpus.find_gpus(Launch(1, 2, 1, 2), AUTO)
    assert (facts.visible, facts.index, facts.name, facts.uuid) == (["A10", "T4"], 1, "T4", "T4-1")
    assert (device, facts.free, facts.capability, facts.bf16) == ("cuda", 3 * GIB, "7.5", False)
    assert facts.others == ["process 4711"]
    assert facts.fault == "CUDA error: no kernel image is available"
    assert gpus.find_gpus(Launch(0, 2, 0, 2), AUTO)[1].bf16


def test_ranks_may_share_a_gpu_only_over_gloo(two_gpus: None) -> None:
    device, facts = gpus.find_gpus(Launch(2, 3, 2, 3), AUTO)
    assert (device, facts.index) == ("cpu", None)
    assert facts.problem.startswith("3 processes on a node where torch sees 2 GPUs; start at most that many")
    device, facts = gpus.find_gpus(Launch(2, 3, 2, 3), DistributedConfig(backend="gloo"))
    assert (device, facts.index, facts.problem) == ("cuda", 0, "")


def test_the_device_of_a_rank(two_gpus: None) -> None:
    assert gather(Launch(0, 2, 0, 2), AUTO, {}, None, None, 60).device == "cuda"
    assert gather(Launch(0, 2, 0, 2), DistributedConfig(device="cpu"), {}, None, None, 60).device == "cpu"


def test_gpus_of_a_job_that_torch_does_not_see(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("distil_tl.distributed.device.has_gpu_files", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gather(Launch(), AUTO, {}, None, None, 60).gpu.problem == ""
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1")
    facts = gather(Launch(), AUTO, {}, None, None, 60)
    assert facts.gpu.problem.startswith("this job was given GPUs (SLURM_JOB_GPUS=0,1), but torch sees none: ")
    assert facts.failed == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gather(Launch(), AUTO, {}, None, None, 60).gpu.problem == ""
    assert caplog.messages == [], "the table has it"


def test_a_probe_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(launch: Launch, config: DistributedConfig) -> gpus.GpuFacts:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("distil_tl.doctor.facts.find_gpus", broken)
    facts = gather(Launch(), AUTO, {}, None, None, 60)
    assert facts.failed == {"GPUs": "could not be checked: OSError: [Errno 5] Input/output error"}
    assert facts.device == "cpu"


def test_probes_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a dead server, asked for three folders, would take three times the limit."""
    last_began = threading.Event()

    def probe(path: str, write: bool) -> FolderFacts:
        if path == "last":
            last_began.set()
        assert last_began.wait(60)
        return FolderFacts(path, path, None, 5)

    monkeypatch.setattr("distil_tl.doctor.facts.probe_folder", probe)
    facts = gather(Launch(), AUTO, {name: (name, True) for name in ("a", "b", "last")}, None, None, 3)
    assert facts.failed == {}
    assert list(facts.folders) == ["a", "b", "last"]
    assert facts.versions["torch"] == torch.__version__


def test_facts_survive_the_way_to_rank_zero() -> None:
    facts = gpu_rank(3, folders={"cache": FolderFacts("c", "/", None, 5)}, failed={"x": "y"})
    assert Facts.from_json(facts.to_json()) == facts
