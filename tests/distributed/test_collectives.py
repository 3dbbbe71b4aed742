"""Shared arrays: equal on all ranks, one copy per node, private writes."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from distil_tl.distributed import collectives
from distil_tl.distributed.collectives import gather_objects, share_arrays
from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.launch_env import Launch, read_launch
from distil_tl.distributed.process_group import DistInfo, init_distributed
from tests.helpers.ranks import rank, run_ranks
from tests.helpers.shared_memory import LINUX, files_in_memory

ARRAYS = {
    "odd": np.arange(13, dtype=np.uint8),
    "none": np.zeros((0, 3), dtype=np.float32),
    "big-endian": np.arange(6, dtype=">i4").reshape(2, 3),
    "transposed": np.arange(2**20, dtype=np.int64).reshape(4, -1).T,
}


def shared(nodes: list[int], fault: str | None = None) -> tuple[bool, list[int], set[int]]:
    """Whether this rank has rank 0's arrays, what it reads after all ranks have written, and its memory's inodes."""
    if fault == "no memory":
        os.posix_fallocate = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    elif fault == "no memory on a node" and rank() == 0:
        vars(collectives)["new_memory"] = lambda size: None
    elif fault == "elsewhere" and rank() == 1:  # that process number is another process here
        collectives._opened = lambda address, size, real=collectives._opened: real([os.getppid(), *address[1:]], size)  # type: ignore[misc]
    collectives.PIECE = 3 << 20  # so that there are several broadcasts
    launch: Launch = read_launch(os.environ)
    here = nodes[rank()]
    launch = replace(launch, node=here, local_rank=nodes[: rank()].count(here), local_world_size=nodes.count(here))
    with init_distributed(launch, DistributedConfig(device="cpu", timeout_seconds=60)) as info:
        got = share_arrays(info, ARRAYS if rank() == 0 else None)
        equal = all(
            np.array_equal(got[name], array) and (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
            for name, array in ARRAYS.items()
        )
        gather_objects(info, None)
        got["odd"][rank()] = 100 + rank()  # a private write
        gather_objects(info, None)
        return equal and list(got) == list(ARRAYS), got["odd"][: len(nodes)].tolist(), files_in_memory()


@LINUX
@pytest.mark.parametrize("nodes", [[0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1], [0, 1]])
def test_ranks_of_a_node_share_one_copy(nodes: list[int]) -> None:
    found = run_ranks(len(nodes), shared, nodes)
    assert all(equal for equal, _, _ in found)
    for one, (_, read, _) in enumerate(found):
        assert read == [100 + one if other == one else other for other in range(len(nodes))], (
            "a write of another rank is visible"
        )
    files = [files for _, _, files in found]
    for node in set(nodes):
        here = [files[one] for one in range(len(nodes)) if nodes[one] == node]
        assert all(one == here[0] for one in here)
        assert len(here[0]) == (1 if len(here) > 1 else 0)
    assert len(set().union(*files)) == sum(nodes.count(node) > 1 for node in set(nodes))


@LINUX
@pytest.mark.parametrize(("fault", "sharing"), [("no memory", 0), ("no memory on a node", 2), ("elsewhere", 3)])
def test_ranks_that_can_not_share_memory_have_their_own_copies(fault: str, sharing: int) -> None:
    found = run_ranks(4, shared, [0, 0, 1, 1], fault)
    assert all(equal for equal, _, _ in found)
    assert sum(bool(files) for _, _, files in found) == sharing


def messages(nodes: list[int]) -> tuple[int, int]:
    """Bytes of the arrays that this rank sends, and receives."""
    counted = {"send": 0, "recv": 0}

    def count(name: str, real: Any, tensor: Any, other: int) -> None:
        counted[name] += tensor.nbytes
        real(tensor, other)

    for name in counted:
        setattr(dist, name, partial(count, name, getattr(dist, name)))
    equal, *_ = shared(nodes)
    assert equal
    return counted["send"], counted["recv"]


@LINUX
def test_each_node_receives_the_arrays_once() -> None:
    nodes = [0, 0, 1, 1, 2]
    found = run_ranks(len(nodes), messages, nodes)
    size = found[2][1]
    assert size > 8 << 20
    assert [received for _, received in found] == [0, 0, size, 0, size]
    assert [sent for sent, _ in found] == [2 * size, 0, 0, 0, 0]


def test_a_single_rank_gets_its_own_arrays() -> None:
    import torch

    assert share_arrays(DistInfo(Launch(), torch.device("cpu"), 1.0), ARRAYS) is ARRAYS
