"""The device of a rank, with a stand-in for torch.cuda; and devices of several ranks that do not fit together."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distil_tl.distributed import device
from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.device import RankDevice, choose_device, describe, gpus_given, problem_of
from distil_tl.distributed.launch_env import Launch, read_launch
from distil_tl.distributed.process_group import init_distributed
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import logger
from tests.helpers.ranks import rank, run_ranks

FOUR = Launch(rank=5, world_size=8, local_rank=1, local_world_size=4, node=1)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Pretends that torch sees a number of GPUs."""

    def pretend(number: int) -> None:
        fake(number, monkeypatch.setattr)

    return pretend


def fake(number: int, patch: Any = setattr) -> None:
    patch(torch.cuda, "is_available", lambda: number > 0)
    patch(torch.cuda, "device_count", lambda: number)
    patch(torch.cuda, "set_device", lambda device: None)
    patch(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device.index}"))


def chosen(launch: Launch, environ: dict[str, str] | None = None, **config: Any) -> tuple[str, str]:
    found, problem = choose_device(launch, DistributedConfig(**config), environ or {})
    return str(found), problem


def test_each_rank_of_a_node_gets_its_own_gpu(gpus) -> None:
    gpus(4)
    assert chosen(FOUR) == ("cuda:1", "")
    assert chosen(FOUR, device="cpu") == ("cpu", "")
    gpus(1)
    assert chosen(replace(FOUR, launcher="slurm")) == ("cuda:0", "")  # each task sees only its own
    assert chosen(Launch()) == ("cuda:0", "")
    assert "4 processes on a node where torch sees 1 GPUs" in chosen(FOUR)[1]
    assert chosen(FOUR, backend="gloo") == ("cuda:0", "")


@pytest.mark.parametrize(
    ("environ", "config", "words"),
    [
        (
            {"CUDA_VISIBLE_DEVICES": "0,1"},
            {},
            "this job was given GPUs (CUDA_VISIBLE_DEVICES=0,1), but torch sees none: ",
        ),
        ({"SLURM_JOB_GPUS": "3"}, {}, "this job was given GPUs (SLURM_JOB_GPUS=3), but torch sees none: "),
        ({"SLURM_GPUS_PER_NODE": "a100:2"}, {}, "this job was given GPUs (SLURM_GPUS_PER_NODE=a100:2), but"),
        ({}, {"device": "cuda"}, "distributed.device=cuda, but torch sees no CUDA device: "),
        ({}, {"backend": "nccl"}, "distributed.backend=nccl, but torch sees no CUDA device: "),
    ],
)
def test_gpus_that_torch_does_not_see_are_refused(gpus, environ: dict[str, str], config: Any, words: str) -> None:
    gpus(0)
    kind, problem = chosen(FOUR, environ, **config)
    assert kind == "cpu"
    assert problem.startswith(words)
    assert problem.endswith("; repair that, or set distributed.device=cpu to use the CPU")
    assert chosen(FOUR, environ, device="cpu") == ("cpu", "")


def test_hidden_gpus_are_not_given() -> None:
    for value in ("", "-1", "NoDevFiles"):
        assert gpus_given({"CUDA_VISIBLE_DEVICES": value, "SLURM_GPUS_ON_NODE": "2"}) == ""
    assert gpus_given({"SLURM_GPUS_ON_NODE": "0"}) == ""
    assert gpus_given({"SLURM_GPUS_ON_NODE": "2"}) == "SLURM_GPUS_ON_NODE=2"


def test_the_reason_is_that_of_torch(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def broken() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check")

    monkeypatch.setattr(torch.cuda, "init", broken)
    assert ": Found no NVIDIA driver on your system; repair" in chosen(FOUR, device="cuda")[1]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert f": torch {torch.__version__} is a build for CPUs; repair" in chosen(FOUR, device="cuda")[1]


def test_a_gpu_that_torch_does_not_use_is_a_warning(
    gpus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpus(0)
    monkeypatch.setattr(device, "has_gpu_files", lambda: True)
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert chosen(Launch()) == ("cpu", "")
    assert "this machine has a GPU, but the CPU is used: " in caplog.text


def test_a_single_process_is_refused_too(gpus) -> None:
    gpus(0)
    with (
        pytest.raises(UserError, match="torch sees no CUDA device"),
        init_distributed(Launch(), DistributedConfig(device="cuda")),
    ):
        pass


def some(*kinds: str, gpus: tuple[str, ...] = ()) -> list[RankDevice]:
    """Devices of ranks, two to a host."""
    identities = (*gpus, *[""] * len(kinds))
    return [RankDevice(i, f"n{i // 2}", 100 + i, kind, identities[i]) for i, kind in enumerate(kinds)]


def test_devices_that_do_not_fit_together() -> None:
    assert problem_of(some("cpu", "cpu", "cpu"), "auto") == ""
    assert problem_of(some("cuda", "cuda", gpus=("a", "b")), "auto") == ""
    mixed = problem_of(some("cuda", "cuda", "cpu", "cpu"), "auto")
    assert mixed.startswith("torch sees CUDA devices on n0 (ranks 0, 1) but none on n1 (ranks 2, 3): ")
    assert "distributed.device=cpu" in mixed
    shared = some("cuda", "cuda", "cuda", gpus=("a", "b", "a"))
    words = "rank 0 (host n0) and rank 2 (host n1) see the same GPU, a, as their own: "
    assert problem_of(shared, "auto").startswith(words)
    assert problem_of(shared, "nccl").startswith(words)
    assert problem_of(shared, "gloo") == ""
    assert problem_of(some("cuda", "cuda"), "auto") == ""  # not known
    broken = [replace(one, problem="no driver" if one.rank > 1 else "") for one in some("cuda", "cuda", "cuda", "cuda")]
    assert problem_of(broken, "auto") == "ranks 2, 3 on n1: no driver"


def test_parts_of_one_gpu_are_different(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2)
    assert describe(FOUR, torch.device("cuda", 1), "").gpu == "GPU-1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    assert describe(FOUR, torch.device("cuda", 1), "").gpu == "GPU-1 MIG-b"
    assert describe(FOUR, torch.device("cpu"), "") == RankDevice(5, os.uname().nodename, os.getpid(), "cpu")


def gpus_of_some(numbers: list[int]) -> str:
    """Each rank pretends to be on a node of its own, with a number of GPUs."""
    fake(numbers[rank()])
    launch = replace(read_launch(os.environ), local_rank=0, local_world_size=1, node=rank())
    try:
        with init_distributed(launch, DistributedConfig(timeout_seconds=60)):
            return "trains"
    except UserError as error:
        return str(error)


def test_all_ranks_refuse_a_node_without_gpus() -> None:
    found = run_ranks(3, gpus_of_some, [1, 1, 0])
    assert found[0].startswith("torch sees CUDA devices on ")
    assert "(rank 2): all ranks need the same kind of device" in found[0]
    assert set(found) == {found[0]}


def test_all_ranks_refuse_a_gpu_that_two_of_them_see() -> None:
    found = run_ranks(3, gpus_of_some, [1, 1, 1])
    assert "and rank 1 (host " in found[0]
    assert "see the same GPU, GPU-0, as their own" in found[0]
    assert set(found) == {found[0]}
